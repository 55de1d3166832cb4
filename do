#!/bin/sh
# Everything this repository is asked to do, on a machine with Python 3.11 or later and a shell.
#
#   ./do setup            make .venv and install the pinned packages (seconds when nothing changed)
#   ./do tour [options]   run notebooks/00_tour.ipynb; options go to papermill, as in -p nfe 4
#   ./do check            lint, types and unit tests, without a notebook (minutes)
#   ./do test             everything: check, and every notebook (long ones at a small scale)
#   ./do lab              open JupyterLab
#   ./do refresh FILES    run notebooks again, in place, and keep their outputs
#   ./do site [options]   write site/: all notebooks as pages, and a reference of the package
#   ./do class            write student/ and solutions/: the lessons for a class and for its teacher
#   ./do lock             pin the newest packages anew, in requirements.txt and environment.yml
#
# PYTHON=/path/to/python3.12 ./do setup chooses another interpreter than python3.
set -eu
cd "$(dirname "$0")"
python=.venv/bin/python

die() {
    echo "do: $1" >&2
    exit 1
}

setup() {
    # What was installed, and where to: a moved checkout has an environment that points elsewhere.
    wanted="$(pwd; cat requirements.txt pyproject.toml)"
    [ "$wanted" != "$(cat .venv/installed 2>/dev/null)" ] || return 0

    base=${PYTHON:-python3}
    command -v "$base" >/dev/null || die "Python 3.11 or later is needed, and there is no $base."
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        die "Python 3.11 or later is needed, and $base is $("$base" --version 2>&1); set PYTHON."
    "$base" -c 'import ensurepip, venv' 2>/dev/null ||
        die "$base lacks the module venv; on Debian and Ubuntu the package python3-venv has it."

    echo "Installing into .venv (a few GB, once)"
    [ -x $python ] || "$base" -m venv .venv
    $python -m pip install --quiet uv
    # Without --python an active environment would be used instead; compiled files halve start-up.
    .venv/bin/uv pip install --quiet --python $python --compile-bytecode -r requirements.txt -e .
    printf '%s\n' "$wanted" >.venv/installed
}

tour() {
    setup
    mkdir -p runs
    $python -m papermill notebooks/00_tour.ipynb runs/00_tour.ipynb "$@"
    echo "The finished notebook is runs/00_tour.ipynb; ./do lab opens it."
}

tests() {
    setup
    # Threads of several processes that share few cores wait for each other: one thread each.
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
    failed=
    $python -m ruff check . || failed="$failed lint"
    $python -m ruff format --check --quiet . || failed="$failed format"
    types=$(mktemp)
    $python -m mypy >"$types" 2>&1 & # beside the tests: it takes a minute where nothing is cached
    checker=$!
    # A process for each core; one that is done takes over tests of another.
    $python -m pytest -n auto --dist worksteal "$@" || failed="$failed tests"
    wait $checker || { failed="$failed types"; cat "$types" >&2; }
    rm -f "$types"
    [ -z "$failed" ] || die "failed:$failed"
}

lock() {
    setup
    .venv/bin/uv pip compile --quiet --upgrade --universal --python-version 3.11 --all-extras \
        --no-annotate --custom-compile-command "./do lock" pyproject.toml -o requirements.txt
    {
        sed '/^  - pip:/q' environment.yml
        sed -n 's/^[a-z]/      - &/p' requirements.txt
        echo '      - -e .'
    } >environment.yml.new
    mv environment.yml.new environment.yml
}

[ $# -gt 0 ] || set -- help
command=$1
shift
case $command in
    setup) setup ;;
    tour) tour "$@" ;;
    check) tests -m 'not kernel and not slow' "$@" ;;
    test) tests "$@" ;;
    refresh) setup; $python notebooks/refresh.py "$@" ;;
    site) setup; $python docs/build.py "$@" ;;
    class) setup; $python notebooks/classroom.py ;;
    lab) setup; exec $python -m jupyterlab "$@" ;;
    lock) lock ;;
    *) sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
