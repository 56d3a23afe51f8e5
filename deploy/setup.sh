#!/usr/bin/env bash
# Sets up what building, testing and the sandbox need, and does nothing when all
# is there: Go, and PostgreSQL's server programs, 15 or newer. On Debian and
# Ubuntu the latter are installed, without a server of the system's own (none is
# made on port 5432). Elsewhere it says what is missing.
set -euo pipefail
cd "$(dirname "$0")/.."

complain() {
	printf 'setup: %s\n' "$@" >&2
	exit 1
}

[ "$(uname -s)" = Linux ] || complain "the sandbox and the tests need Linux (timerfd, /proc, parent-death signals)"

command -v go >/dev/null ||
	complain "Go 1.26 or newer is needed, and no go is on the PATH: https://go.dev/dl/"
# In this module a go command since 1.21 fetches the version that go.mod asks
# for, unless that is forbidden or the network is away.
version=$(go env GOVERSION 2>&1) ||
	complain "Go 1.26 or newer is needed; go says: $version" "install it from https://go.dev/dl/"
minor=$(sed -n 's/^go1\.\([0-9]*\).*/\1/p' <<<"$version")
[ "${minor:-0}" -ge 26 ] || complain "Go 1.26 or newer is needed, $version is on the PATH: https://go.dev/dl/"

# server_bin prints the directory of the newest server programs from 15 on.
server_bin() {
	local dir major best=0 best_dir=
	for dir in "$(pg_config --bindir 2>/dev/null || true)" /usr/lib/postgresql/*/bin; do
		for program in postgres initdb pg_dump psql pgbench; do
			[ -x "$dir/$program" ] || continue 2
		done
		major=$("$dir/postgres" --version | sed -n 's/^postgres (PostgreSQL) \([0-9]*\).*/\1/p')
		if [ "${major:-0}" -ge 15 ] && [ "$major" -gt "$best" ]; then
			best=$major best_dir=$dir
		fi
	done
	[ -n "$best_dir" ] && echo "$best_dir"
}

install_postgresql() {
	local candidate
	command -v apt-get >/dev/null ||
		complain "PostgreSQL 15 or newer is missing: postgres, initdb, psql, pg_dump, pgbench." \
			"install its server, client and contrib packages, with pg_config on the PATH; only Debian's and Ubuntu's are installed from here"
	local as_root=()
	if [ "$(id -u)" -ne 0 ]; then
		sudo -n true 2>/dev/null ||
			complain "PostgreSQL 15 or newer is missing and installing it needs root: run sudo deploy/setup.sh"
		as_root=(sudo -n)
	fi
	export DEBIAN_FRONTEND=noninteractive
	echo "setup: installing PostgreSQL"
	"${as_root[@]}" apt-get update -q
	candidate=$(apt-cache policy postgresql | sed -n 's/^  Candidate: \([0-9]*\).*/\1/p')
	[ "${candidate:-0}" -ge 15 ] ||
		complain "PostgreSQL 15 or newer is needed, this system offers ${candidate:-none}:" \
			"add PostgreSQL's own packages (https://www.postgresql.org/download/linux/) and run this again"
	# No server of the system's own: told to postgresql-common before the server
	# package is installed, and taken back after, since it is the user's to decide
	# what a later installation does.
	"${as_root[@]}" apt-get install -y -q --no-install-recommends postgresql-common
	local note=/etc/postgresql-common/createcluster.d/quorate-setup.conf
	"${as_root[@]}" mkdir -p "$(dirname "$note")"
	"${as_root[@]}" sh -c "echo 'create_main_cluster = false' >$note"
	local result=0
	"${as_root[@]}" apt-get install -y -q --no-install-recommends postgresql postgresql-contrib || result=$?
	"${as_root[@]}" rm -f "$note"
	[ "$result" -eq 0 ] || complain "apt-get could not install postgresql, see above"
}

if ! server_bin >/dev/null; then
	install_postgresql
	server_bin >/dev/null || complain "PostgreSQL was installed, and yet postgres, initdb, psql, pg_dump and pgbench of 15 or newer are not found"
fi
if [ "$(id -u)" -eq 0 ] && ! id postgres >/dev/null 2>&1; then
	complain "as root the servers run as user postgres, which is missing: useradd --system postgres"
fi
