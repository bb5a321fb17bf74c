# Steps of gpu_check.sh: about ten minutes.
step versions 60 $python -c "import sys, torch; print(sys.version, torch.__version__, torch.version.cuda, torch.backends.cudnn.version()); print(torch.cuda.is_available() and torch.cuda.get_device_properties(0))"
for dtype in $half float32; do step sample-$dtype 60 $python sample.py --device $device --dtype $dtype --out "$out/$dtype"; done
step test_gpu 150 $python -m pytest -o addopts=-q -n 8 tests/test_gpu.py -k "not compiled"
bench s3diff 90 s3diff $side --repeat $repeat
bench 0.5b-1step 60 $one $side --repeat $repeat
bench 0.5b 60 $many $side --repeat 3
bench gramsr 90 gramsr $side --repeat $repeat
bench s3diff-512 60 s3diff $large --repeat 3
bench train 240 train $side --repeat 3 --batch 1
