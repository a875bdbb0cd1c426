#!/usr/bin/env bash
# Makes this checkout runnable with a Python that has JAX, without a network and without installing anything into it.
#
#   scripts/install_offline.sh [PYTHON] && . build/offline/env
#
# The compiled kernels come from the first of these that loads: an extension beside the package, a wheel or an extension of that Python in
# .offline/ (made elsewhere: `python3.12 -m pip wheel --no-deps --wheel-dir .offline .`), a build against the jaxlib that is there (CMake and
# a C++ compiler, at most 150 s). Without any the jnp forms run (SPECMOE_CPU_OPS=ref), and that is said. Python packages that are missing
# are taken from wheels in .offline/. Each step says how long it took.
set -uo pipefail
cd "$(dirname "$0")/.."

python=${1:-python3}
out=build/offline
mkdir -p "$out"
rm -f "$out/env"
say() { printf '[%3d s] %s\n' "$SECONDS" "$1"; }

suffix=$("$python" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))') || { echo "error: no Python $python"; exit 1; }
tag=$("$python" -c 'import sys; print("cp%d%d" % sys.version_info[:2])')
target=specmoe_jax/_cpu_ops$suffix
export PYTHONPATH="$PWD:$PWD/$out/site" JAX_PLATFORMS=cpu
say "$("$python" --version), extension $target"

needed="jax jaxlib flax orbax.checkpoint optax numpy scipy absl safetensors tokenizers tqdm ml_dtypes"
missing() { "$python" - $needed <<'END'
import importlib.util, sys

def is_there(name):
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False

print(*(name for name in sys.argv[1:] if not is_there(name)))
END
}

loads() { # the kernels, in a process of its own
  "$python" -W error -c 'import sys; from specmoe_jax.ops.cpu import _ffi; print(*_ffi.isas()); sys.exit(not _ffi.isas())' 2>"$out/load.log"
}

carried() { # puts the extension that came along beside the package
  local wheel
  for wheel in .offline/specmoe_jax-*-"$tag"-*.whl; do
    [ -f "$wheel" ] || continue
    "$python" -m zipfile -e "$wheel" "$out/wheel" && cp -f "$out/wheel/$target" "$target" && rm -rf "$out/wheel" && return 0
  done
  [ -f ".offline/_cpu_ops$suffix" ] && cp -f ".offline/_cpu_ops$suffix" "$target"
}

built() {
  command -v cmake >/dev/null && command -v "${CXX:-c++}" >/dev/null || { echo "no CMake or C++ compiler" >"$out/build.log"; return 1; }
  local pybind
  pybind=$("$python" -m pybind11 --cmakedir 2>"$out/build.log") || return 1
  timeout 150 bash -c "cmake -S cpu_ops -B $out/cmake -DSPECMOE_TESTS=OFF -DPython_EXECUTABLE=\"\$(command -v $python)\" -Dpybind11_DIR=$pybind &&
    cmake --build $out/cmake --parallel" >"$out/build.log" 2>&1 || return 1
  rm -f "$target" && cp "$(find "$out/cmake" -name "_cpu_ops*.so" | head -1)" "$target"
}

if [ -n "$(missing)" ]; then
  for name in .offline/*.whl; do
    case $name in .offline/specmoe_jax-* | '.offline/*.whl') continue ;; esac
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$out/site" "$name" && say "$name: in $out/site"
  done
fi
if [ -n "$(missing)" ]; then
  say "error: $python lacks $(missing); put wheels of them into .offline/"
  exit 1
fi
say "Python packages: all there"

kernels=ref
if [ -f "$target" ] && isas=$(loads); then
  kernels=auto && say "kernels: beside the package already ($isas)"
elif carried && isas=$(loads); then
  kernels=auto && say "kernels: from .offline ($isas)"
else
  say "kernels: none that loads came along; compiles them"
  rm -f "$target"
  if built && isas=$(loads); then
    kernels=auto && say "kernels: compiled here ($isas)"
  else
    say "kernels: none ($(tail -n 1 "$out/build.log" "$out/load.log" 2>/dev/null | tail -n 1)); runs the slower jnp forms"
  fi
fi
{
  echo "export PYTHONPATH=\"$PYTHONPATH\${PYTHONPATH:+:\$PYTHONPATH}\""
  echo "export SPECMOE_CPU_OPS=$kernels"
} >"$out/env"
say "done: . $out/env"
