# SPDX-License-Identifier: GPL-2.0-or-later
# shellcheck shell=bash
#
# What the tools have in common: words for the user, Debian packages, the virtual environment,
# and a Debian tree made like the machine's own. Sourced by them; does nothing by itself.

TOP=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
# shellcheck disable=SC2034  # for those who source this
VENV=${UNIONFS_VENV:-$TOP/.venv}
ME=${0##*/}

say() { printf '%s: %s\n' "$ME" "$*"; }
warn() { printf '%s: %s\n' "$ME" "$*" >&2; }
die() {
    warn "$*"
    exit 1
}
is_root() { [ "$(id -u)" = 0 ]; }

# packages GROUP...: the names listed under these groups.
packages() {
    local group
    for group in "$@"; do
        awk -v group="$group" '$1 == group { print $2 }' "$TOP/tools/packages"
    done | sort -u
}

# missing PACKAGE...: those of them that are not installed.
missing() {
    local installed
    installed=$(dpkg-query -W -f '${db:Status-Status} ${Package}\n' "$@" 2>/dev/null |
        awk '$1 == "installed" { print $2 }' | sort -u || true)
    comm -23 <(printf '%s\n' "$@" | sort -u) <(printf '%s\n' "$installed")
}

# need GROUP...: has these packages installed, or ends with one line that names what is missing.
need() {
    local -a names absent
    if ! command -v dpkg-query >/dev/null; then
        warn "no dpkg here: not checking for $(packages "$@" | tr '\n' ' ')(Debian's names)"
        return
    fi
    mapfile -t names < <(packages "$@")
    mapfile -t absent < <(missing "${names[@]}")
    [ "${#absent[@]}" -gt 0 ] || return 0
    is_root || die "missing packages; as root: apt-get install --no-install-recommends ${absent[*]}"
    say "installing by apt-get: ${absent[*]}"
    apt_get update
    apt_get install --no-install-recommends "${absent[@]}"
}

# apt_get VERB...: without questions, quiet as long as it succeeds.
apt_get() {
    local words
    words=$(DEBIAN_FRONTEND=noninteractive apt-get -qq -y -o Acquire::Retries=3 \
        -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0 "$@" 2>&1 </dev/null) || {
        printf '%s\n' "$words" >&2
        die "apt-get $1 failed (above)"
    }
}

# debian_sources: the machine's own apt sources of its Debian release, one a line.
debian_sources() {
    # shellcheck disable=SC2016  # apt's own placeholders
    apt-get indextargets --format '$(ORIGIN)|deb $(REPO_URI) $(RELEASE) $(COMPONENT)' \
        'Created-By: Packages' | sed -n 's/^Debian|//p' | sort -u
}

# machine_settings DIR: fills it with what a new tree needs to reach the package archives as this
# machine does: pip's settings and local certificates.
machine_settings() {
    mkdir -p "$1/etc" "$1/usr/local/share/ca-certificates"
    cp -L /usr/local/share/ca-certificates/*.crt "$1/usr/local/share/ca-certificates/" \
        2>/dev/null || true
    cp -L /etc/pip.conf "$1/etc/pip.conf" 2>/dev/null || true
}

# debian_tree TARGET PACKAGE,...: a small Debian system from the machine's own apt sources.
# As root TARGET is a directory; as a user with subordinate ids it must be a .tar file.
debian_tree() {
    local target=$1 include=$2 work codename network mode=unshare status=0
    local -a sources
    codename=$(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release)
    mapfile -t sources < <(debian_sources)
    [ "${#sources[@]}" -gt 0 ] || die "apt knows no Debian archive; as root: apt-get update"
    ! is_root || mode=root
    work=$(mktemp -d -p "$(dirname "$target")")
    chmod 755 "$work"
    machine_settings "$work"
    network=$(apt-config dump | grep -E '^Acquire::(http|https|Check-|Force|Max-|Retries)' || true)
    # The customize hook runs under sh with the tree as $1: the package manager in the tree shall
    # find a place to bind the machine's resolv.conf over.
    # shellcheck disable=SC2016
    mmdebstrap --quiet --mode="$mode" --variant=apt --include="ca-certificates,$include" \
        --aptopt="$network" --setup-hook="sync-in $work /" \
        --customize-hook='rm -f "$1/etc/resolv.conf"; : >"$1/etc/resolv.conf"' \
        "$codename" "$target" "${sources[@]}" || status=$?
    rm -rf "$work"
    return "$status"
}
