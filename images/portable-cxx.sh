#!/bin/sh
# The C++ compiler (as CXX) while DeepSpeed's operators are built into an image. DeepSpeed asks for the processor that builds; the image
# runs on others. Any x86-64 since 2013 will do instead: AVX2 and FMA, never AVX-512.
for argument do
  shift
  case $argument in
    -march=native) argument=-march=haswell ;;
    -D__AVX512__ | -D__SCALAR__) argument=-D__AVX256__ ;;
  esac
  set -- "$@" "$argument"
done
exec g++ "$@"
