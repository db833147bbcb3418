#!/bin/sh
# Installs the S3 servers of tests/real/s3.py: Ceph (system packages; Debian or Ubuntu, as root) and Swift (in .swift), and
# builds the retrieval tasks of tests/real/tasks.py (in .tasks, from Debian packages).
# Says in a line each what was done or why not; quick when all is there. Without Ceph its tests skip, Swift's still run.
set -eu
cd "$(dirname "$0")/../.."
swift_version=2.38.3
ceph_packages="radosgw ceph-mon ceph-osd"

ceph_is_there() { command -v radosgw && command -v ceph-mon && command -v ceph-osd; }
apt_install() { DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $ceph_packages; }

if ceph_is_there >/dev/null; then
    echo "ceph: already there"
elif ! command -v apt-get >/dev/null; then
    echo "ceph: skipped, no apt-get here; for its tests install radosgw, ceph-mon and ceph-osd by other means"
elif [ "$(id -u)" != 0 ]; then
    echo "ceph: skipped, not root; for its tests: sudo apt-get install --no-install-recommends $ceph_packages"
elif apt_install >/dev/null 2>&1 || { apt-get update -qq >/dev/null && apt_install >/dev/null; }; then
    echo "ceph: installed"
else
    echo "ceph: skipped, apt-get could not install $ceph_packages (see above)"
fi

if [ "$(.swift/bin/python -c 'from importlib.metadata import version; print(version("swift"))' 2>/dev/null)" = "$swift_version" ]; then
    echo "swift: already there"
elif python3 -m venv .swift && .swift/bin/pip install -q --disable-pip-version-check "swift==$swift_version"; then
    echo "swift: installed in .swift"
else
    echo "swift: skipped, see above" >&2
    exit 1
fi

if [ ! -x .venv/bin/python ]; then
    echo "tasks: skipped, no .venv: run make setup first"
elif reason=$(.venv/bin/python -c 'from tests.real.tasks import missing; print(missing() or "")') && [ -n "$reason" ]; then
    echo "tasks: skipped, $reason"
elif .venv/bin/python -m tests.real.tasks >/dev/null; then
    echo "tasks: in .tasks"
else
    echo "tasks: skipped, see above"
fi
