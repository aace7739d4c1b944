"""What tnlayers does on a CUDA card: whether its numbers are right, how fast it is, and what nets learn in full schedules.

python -m benchmarks.gpu --out results/gpu/h100.json --data cifar10-jpeg.tar.xz --checkpoint resnet20-12fca82f.th
python -m benchmarks.gpu.tables results/gpu/h100.json > docs/gpu.md
"""
