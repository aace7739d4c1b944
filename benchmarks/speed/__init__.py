"""How much of the work that factorized layers save is saved as time, next to dense layers and tltorch's.

python -m benchmarks.speed                                  # 19 minutes, writes results/speed/cpu.json or cuda.json
python -m benchmarks.speed --quick                          # under 3 minutes, the rows that matter most
python -m benchmarks.speed.tables results/speed/cpu.json    # writes docs/speed.md and its picture

All figures are ratios of one run: what is compared takes turns in one process, and medians are taken. A run goes on with the
rows of its file. Weights are random, since times do not depend on them.
"""
