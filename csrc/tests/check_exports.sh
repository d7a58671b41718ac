#!/bin/sh
# The dynamic symbols that a shared library defines must be the functions that the headers mark LOFTQ_API, in the
# namespace given, and no others; and all of its symbols must be in that namespace:
#   check_exports.sh LIBRARY NAMESPACE HEADER...
set -eu
library=$1 namespace=$2
shift 2
nm -D --defined-only -C "$library" | cut -d ' ' -f 3- | sed 's/(.*//' | sort >exported.txt
sed -n "s/^LOFTQ_API [^(]* \**\([a-z_]*\)(.*/$namespace::\1/p" "$@" | sort >declared.txt
test -s declared.txt
diff declared.txt exported.txt
if nm -C "$library" | sed "s/$namespace:://g" | grep loftq::; then
  echo "these symbols are not in $namespace"
  exit 1
fi
