"""benchmarks/multi_gpu.py: what is tried of each engine, and what its command line refuses."""

import argparse

import pytest

from benchmarks import multi_gpu_cases as cases


@pytest.mark.parametrize("engine", cases.ENGINES)
def test_the_best_of_each_length_is_measured_on_all_rows(engine):
    found = cases.tuning(engine, 1024, 2048, 128, 2)
    assert [case["seq"] for case in found if "best" in case] in ([2048, 1024],)
    assert all(case["rows"] == 32 for case in found if "best" not in case and "keep" not in case)
    assert not any("rows" in case for case in found if "keep" in case)  # 128
    for place, case in enumerate(found):
        if "best" in case:
            assert any(one["seq"] == case["best"] and one.get("data") == case.get("data") for one in found[:place])
    assert len({str(sorted(case.items())) for case in found}) == len(found)


@pytest.mark.parametrize("engine", ["fsdp2", "fsdp2-compiled", "zero3"])
def test_peers_are_tried_with_every_micro_batch_and_recomputation(engine):
    found = [case for case in cases.tuning(engine, 1024, 2048, 128, 2) if case["seq"] == 2048 and "best" not in case]
    assert {case["micro"] for case in found} >= {1, 2, 4, 8} and {case["recompute"] for case in found} == {"none", "blocks"}
    assert any(case.get("keep") for case in found) == engine.startswith("fsdp2")


def row_of(case, speed=None, rows=32):
    return dict(case, rows=rows, **({"tokens_per_s": speed} if speed else {"error": "out of memory"}))


def test_after_a_failure_the_best_waits_for_those_that_are_left():
    wide, two, again, best = ({"seq": 64, "micro": 4, "recompute": "none"}, {"seq": 64, "micro": 2, "recompute": "none"},
                              {"seq": 64, "micro": 8, "recompute": "blocks"}, {"seq": 64, "best": 64})  # fmt: skip
    assert cases.worthwhile([row_of(wide)], [two, again, best]) == [two, again, best]
    assert cases.worthwhile([row_of(wide), row_of(two)], [dict(wide, micro=8), again, best]) == [again, best]
    assert cases.worthwhile([row_of(again)], [dict(again, micro=16), best, dict(two, seq=32)]) == [dict(two, seq=32)]
    assert cases.worthwhile([row_of(two, 9.0), row_of(wide)], [best]) == [best]
    assert cases.worthwhile([row_of(dict(two, data=2), 9.0), row_of(wide)], [best]) == []
    assert cases.worthwhile([row_of(dict(two, keep=True))], [two]) == [two]


def test_the_best_is_the_fastest_that_did_not_have_all_rows():
    some = [row_of({"seq": 64, "micro": micro, "recompute": "none"}, speed, rows) for micro, speed, rows in
            ((1, 5.0, 32), (2, 7.0, 32), (4, 9.0, 128))]  # fmt: skip
    best = {"seq": 64, "best": 64}
    assert cases.fastest(some, best, 128)["micro"] == 2
    assert cases.fastest(some[2:] + [{"seq": 64, "rows": 32, "error": "out of memory"}], best, 128)["micro"] == 4
    assert cases.fastest(some, dict(best, best=32), 128) is cases.fastest(some, dict(best, data=1), 128) is None


def test_the_default_parts_and_own_ones():
    assert cases.parts("llama,road,longest-bloom") == [("llama", None), ("road", None), ("longest-bloom", None)]
    assert cases.parts("bloom:fsdp2+zero3,road:killed") == [("bloom", ["fsdp2", "zero3"]), ("road", ["killed"])]


def test_a_pipelines_given_cases_have_what_all_of_it_have():
    text = '{"pipeline-fp8": [{"seq": 64, "micro": 1, "recompute": "none"}], "zero3": [{"seq": 64, "best": 128}]}'
    assert cases.given(text) == {
        "pipeline-fp8": [{"data": 1, "compile": True, "fp8": True, "seq": 64, "micro": 1, "recompute": "none"}],
        "zero3": [{"seq": 64, "best": 128}],
    }


@pytest.mark.parametrize("read, text, message", [
    (cases.parts, "foo", "'foo' is none of llama, bloom, llama-13b, road, longest-llama, longest-bloom, longest-llama-13b"),
    (cases.parts, "llama:fsdp3", "llama has no 'fsdp3' (but pipeline, pipeline-fp8, fsdp2-compiled, fsdp2, zero3, pipeline2)"),
    (cases.parts, "longest-llama:zero3", "longest-llama has no 'zero3' (but nothing)"),
    (cases.given, "{", "not JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1)); expected such as"),
    (cases.given, "[]", "expected an engine's name and a list of cases, such as {"),
    (cases.given, '{"nope": [{}]}', "'nope' is none of pipeline, pipeline-fp8"),
    (cases.given, '{"zero3": [{"seq": 4}]}', 'a case of zero3 lacks seq, micro or recompute: {"seq": 4}'),
])  # fmt: skip
def test_what_is_refused(read, text, message):
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        read(text)
    assert str(caught.value).startswith(message)
