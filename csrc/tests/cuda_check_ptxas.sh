#!/bin/sh
# Compiles every CUDA source for every architecture with all warnings as errors, prints what ptxas says of each kernel
# (registers, shared memory, spills), and fails if one spills. Exit status: 0 passed, 1 failed, 77 skipped without nvcc.
#
# LOFTQ_CUDA_ARCHS="90 120" chooses architectures, NVCC the compiler.
set -u

source_dir=$(cd "$(dirname "$0")/.." && pwd)
nvcc=${NVCC:-$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)}
archs=${LOFTQ_CUDA_ARCHS:-80 86 89 90 100 120}

if ! command -v "$nvcc" >/dev/null 2>&1; then
  echo "skipped: no nvcc"
  exit 77
fi

log=$(mktemp)
trap 'rm -f "$log"' EXIT
failed=0
printf '%-7s %-62s %5s %6s %6s\n' arch kernel regs shared spills

for source in "$source_dir"/cuda/*.cu; do
  for arch in $archs; do
    if ! "$nvcc" -std=c++17 -O3 -arch="sm_$arch" -cubin -o /dev/null -I"$source_dir/include" \
        -Xcompiler -Wall,-Wextra -Xptxas -v,-warn-spills,-warn-lmem-usage -Werror all-warnings \
        "$source" >"$log" 2>&1; then
      echo "FAILED: $source for sm_$arch"
      grep -E 'error|warning' "$log"
      failed=1
    fi
    # "Function properties for X", its spills and "Used N registers" come on three lines.
    awk -v arch="sm_$arch" '
      /Function properties for/ { name = $NF }
      /bytes spill stores/ { stack = $1; spill = $5 + $9 }
      /Used [0-9]+ registers/ {
        shared = 0
        for (i = 2; i <= NF; ++i) if ($i ~ /^smem/) shared = $(i - 2)
        print arch, name, $5, shared, spill
      }' "$log" | c++filt | sed 's/(anonymous namespace):://g; s/void //; s/loftq:://g; s/unversioned:://g; s/([^)]*)//' |
      awk '{ name = $2
             for (i = 3; i <= NF - 3; ++i) name = name " " $i
             printf "%-7s %-62s %5s %6s %6s\n", $1, name, $(NF - 2), $(NF - 1), $NF
             bad += $NF > 0 } END { exit bad > 0 }' ||
      failed=1
  done
done
[ $failed = 0 ] && echo "no spills, no warnings"
exit $failed
