# Sourced by the launch scripts: the repository as working folder, and a virtual environment with diffjax in it.
#
#   source launch/_env.sh; prepare test        # extras of setup.py, separated by commas
#
# An active environment is used as it is; otherwise .venv in the repository is made. Packages are installed
# when setup.py has changed since the last time, and only then a package registry is needed.

cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
  echo "error: $*" >&2
  exit 2
}

# Shows a command, then runs it.
run() {
  echo
  echo "> $*"
  "$@"
}

# The folder of the environment that `prepare` uses.
environment() {
  echo "${VIRTUAL_ENV:-${CONDA_PREFIX:-$PWD/.venv}}"
}

# For scripts that pass their flags on to diffjax.cli.train: sets `arguments` (quoted, without --dry_run), `workdir` and
# `dry_run` (yes or no), and fails before anything is installed or queued.
# shellcheck disable=SC2034  # used by the scripts
read_arguments() {
  local argument config=
  arguments='' workdir='' dry_run=no
  for argument in "$@"; do
    case "$argument" in
      --dry_run) dry_run=yes && continue ;;
      --config=*) config=${argument#*=} ;;
      --workdir=*) workdir=${argument#*=} ;;
    esac
    arguments+=" $(printf %q "$argument")"
  done
  [ -n "$config" ] || fail "--config is missing; for example --config=configs/quick/edm_digits.py"
  [ -f "${config%%:*}" ] || fail "config file ${config%%:*} does not exist; there are: $(echo configs/*/*.py)"
  [ -n "$workdir" ] || fail "--workdir is missing; for example --workdir=runs/digits_teacher"
}

find_python() {
  local candidate
  for candidate in "${PYTHON:-python3}" python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  fail "found $(python3 --version 2>&1), expected Python 3.11 to 3.13: install one, or type PYTHON=/path/to/python bash $0"
}

prepare() {
  local extras=$1
  if [ -z "${VIRTUAL_ENV:-}" ] && [ -z "${CONDA_PREFIX:-}" ]; then
    if [ ! -x .venv/bin/python ]; then
      local python
      python=$(find_python)
      echo "making .venv with $("$python" --version)"
      "$python" -m venv .venv || fail "could not make .venv: install the venv module of $python (Debian: apt install python3-venv)"
    fi
    # shellcheck disable=SC1091
    source .venv/bin/activate
  fi
  local stamp
  stamp="$(python -c 'import sys; print(sys.prefix)')/.diffjax-$extras"
  local sum
  sum=$(cksum <setup.py)
  if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$sum $PWD" ]; then
    python -m pip download --quiet --no-deps --retries 0 --timeout 20 --dest "$(mktemp -d)" setuptools wheel >/dev/null 2>&1 ||
      fail "no package registry answers, and packages must be installed: connect to a network (or set PIP_INDEX_URL), then run this again"
    echo "installing diffjax[$extras]"
    python -m pip install --quiet --disable-pip-version-check -e ".[$extras]" || fail "the installation failed, see above"
    echo "$sum $PWD" >"$stamp"
  fi
  export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$PWD/.cache/jax}"
}
