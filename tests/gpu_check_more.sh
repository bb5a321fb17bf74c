# Steps of gpu_check.sh for another half an hour:  STEPS=tests/gpu_check_more.sh bash tests/gpu_check.sh RESULTS
for model in s3diff gramsr; do
    for dtype in float32 tf32 ${half#float16}; do bench $model-$dtype 120 $model $side --dtype $dtype --repeat 3; done
    bench $model-compiled 400 $model $side --compile --repeat $repeat
    bench $model-graphs 120 $model $side --graphs --repeat $repeat         # without CUDA it only says so
    bench $model-compiled-graphs 400 $model $side --compile --graphs --repeat $repeat
    bench $model-batch8 120 $model $side --batch 8 --repeat 3
done
bench 0.5b-1step-graphs 120 $one $side --graphs --repeat $repeat
bench 0.5b-graphs 120 $many $side --graphs --repeat 3
bench 0.5b-1step-batch8 120 $one $side --batch 8 --repeat 3
bench train-full 400 train $side --repeat 3
step precision 300 $python tests/precision.py --device $device $tiny
step trace 120 $python tests/bench.py s3diff $side $tiny --device $device --trace "$out/trace.json"
step test_gpu_compiled 900 $python -m pytest -o addopts=-q -n 6 tests/test_gpu.py -k compiled
