"""Data, model families, blocks, pipeline training, checkpoints, launcher. Imports nothing.

Who may import whom, lowest first (CONTRIBUTING.md says it in full, tests/unit/test_imports.py checks it):

    errors < families, manifest, data.records, data.template < config < compat < models, data, plan
           < stages, weights < engine, checkpoint, metrics < loop, worker < prepare < launch
"""
