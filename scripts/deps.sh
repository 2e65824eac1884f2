#!/bin/sh
# Install the brokers that the tests start for themselves, if they are missing; with the argument
# "bench" also what the benchmarks compare and count with.
#
# Uses apt-get as root or through a sudo that asks for no password; elsewhere it says what to
# install. No service is started, stopped or changed: the tests run private servers.
set -eu

have_rabbitmq() {
    command -v rabbitmq-server >/dev/null 2>&1 || [ -x /usr/sbin/rabbitmq-server ] ||
        ls -d /usr/lib/rabbitmq/bin/rabbitmq-server /opt/homebrew/opt/rabbitmq/sbin \
            /usr/local/opt/rabbitmq/sbin /opt/rabbitmq/sbin 2>/dev/null | grep -q .
}
have_redis() {
    command -v redis-server >/dev/null 2>&1
}

have_librabbitmq() {
    [ -e /usr/include/amqp.h ] || [ -e /usr/local/include/amqp.h ] ||
        ls /usr/include/rabbitmq-c/amqp.h /opt/homebrew/include/amqp.h 2>/dev/null | grep -q .
}

missing=
have_rabbitmq || missing="$missing rabbitmq-server"
have_redis || missing="$missing redis-server"
if [ "${1:-}" = bench ]; then
    have_librabbitmq || missing="$missing librabbitmq-dev"
    command -v cc >/dev/null 2>&1 || missing="$missing gcc libc6-dev"
    command -v strace >/dev/null 2>&1 || missing="$missing strace"
fi
[ -n "$missing" ] || exit 0
echo "missing:$missing"

sudo=
if [ "$(id -u)" -ne 0 ]; then
    if sudo -n true 2>/dev/null; then sudo="sudo -n"; else sudo=none; fi
fi
instructions() {
    echo "They cannot be installed from here. Install them with the system's package manager:"
    echo "    Debian, Ubuntu:  sudo apt-get install --no-install-recommends$missing"
    echo "    Fedora:          sudo dnf install rabbitmq-server redis"
    echo "    macOS:           brew install rabbitmq redis"
    echo "Their services need not run. Tests that need a missing broker are skipped."
    # Where CI is set a missing broker fails those tests: better to fail here, at once.
    [ -z "${CI:-}" ]
}

if ! command -v apt-get >/dev/null 2>&1 || [ "$sudo" = none ]; then
    instructions
    exit
fi

# While this file says 101, Debian's packages start no service (policy-rc.d interface of invoke-rc.d).
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    trap '$sudo rm -f "$policy"' EXIT INT TERM
    printf '#!/bin/sh\nexit 101\n' | $sudo tee "$policy" >/dev/null
    $sudo chmod 755 "$policy"
fi
# shellcheck disable=SC2086 - a list of words
if ! { $sudo apt-get update -q &&
    $sudo env DEBIAN_FRONTEND=noninteractive \
        apt-get install -q -y --no-install-recommends $missing; }; then
    echo "apt-get failed: no network, or the package is not in its lists."
    instructions
fi
