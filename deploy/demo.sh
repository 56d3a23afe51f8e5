#!/usr/bin/env bash
# The first hour: five regions with the delays of real places, a small live
# workload, and what to try. `make demo` builds and calls it. With a terminal it
# stays until Ctrl-C, which takes all down; without one it leaves the sandbox
# running until `make demo-down`. JAEGER=1 runs Jaeger too.
set -euo pipefail
cd "$(dirname "$0")/.."

ctl=bin/paxosctl
dir=.sandbox

# write_rows writes a row twice a second, wherever the leader is: the connection
# string lists all regions, and libpq takes the one that takes writes. It ends
# with the sandbox.
write_rows() {
	local hosts ports url begin end
	hosts=$(for r in $1; do "$ctl" dev dsn "$r" --dir "$dir"; done | sed 's|.*@\(.*\)/.*|\1|' | paste -sd, -)
	url="postgres://postgres@$hosts/app?target_session_attrs=read-write&connect_timeout=3"
	while "$ctl" dev status --dir "$dir" >/dev/null 2>&1; do
		begin=$(date +%s%3N)
		if psql "$url" -qAtX -v ON_ERROR_STOP=1 -c \
			"INSERT INTO demo (written_in) SELECT quorate.leader() RETURNING 'row ' || id || ' written in ' || written_in" 2>&1; then
			end=$(date +%s%3N)
			echo "  committed in a majority of regions; $((end - begin)) ms with connecting"
		fi
		sleep 0.5
	done
}

if [ "${1:-}" = --workload ]; then
	write_rows "$2"
	exit
fi

up=(dev up --dir "$dir" --wan global --feed --detach)
[ -n "${JAEGER:-}" ] && up+=(--jaeger)
"$ctl" "${up[@]}" >/dev/null
# psql of the servers' version, where none is on the PATH.
PATH=$PATH:$(sed -n 's/^ *bin_dir: //p' "$dir/r1/region.yaml")
[ -t 1 ] && trap '"$ctl" dev down --dir "$dir"' EXIT

leader=$("$ctl" leader --dir "$dir")
leader_dsn=$("$ctl" dev dsn "$leader" --dir "$dir")
regions=$("$ctl" dev status -o json --dir "$dir" | sed -n 's/^      "region": "\(.*\)",$/\1/p' | tr '\n' ' ')
psql "$leader_dsn" -qX -v ON_ERROR_STOP=1 <<'SQL'
SET client_min_messages = warning;
CREATE TABLE IF NOT EXISTS demo (
	id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
	written_at timestamptz NOT NULL DEFAULT now(),
	written_in text
);
SQL
setsid flock -n "$dir/workload.lock" "$0" --workload "$regions" >>"$dir/workload.log" 2>&1 </dev/null &

echo
"$ctl" dev status --dir "$dir"
echo
"$ctl" status --dir "$dir"

if [ -n "${JAEGER:-}" ]; then
	jaeger=$("$ctl" dev status -o json --dir "$dir" | sed -n 's/^  "jaeger_url": "\(.*\)",$/\1/p')
	trace=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
	psql "$leader_dsn" -qAtX -v ON_ERROR_STOP=1 >/dev/null <<SQL
BEGIN;
SELECT quorate.trace('00-$trace-$(od -An -N8 -tx1 /dev/urandom | tr -d ' \n')-01');
INSERT INTO demo (written_in) SELECT quorate.leader();
COMMIT;
SQL
	echo
	for _ in $(seq 60); do
		if curl -fsS "$jaeger/api/traces/$trace" 2>/dev/null | grep -q spanID; then
			found=1
			break
		fi
		sleep 0.25
	done
	if [ -n "${found:-}" ]; then
		echo "The trace of a commit just made: $jaeger/trace/$trace"
	else
		echo "No span of the commit just made has reached Jaeger in 15 s: $jaeger" >&2
		exit 1
	fi
fi

follower=$(for r in $regions; do [ "$r" = "$leader" ] || echo "$r"; done | tail -1)
cat <<TEXT

A row is written twice a second; see $dir/workload.log. Try, in another terminal:

  Write where the leader is, and read elsewhere
    psql $leader_dsn
    $ctl dev psql $follower -c 'SELECT count(*), max(written_at) FROM demo'
    $ctl dev psql $follower -c 'DELETE FROM demo'        # refused: SQLSTATE 25006, and a hint
    $ctl dev psql $follower -c 'TABLE quorate.status'

  Kill the leader, PostgreSQL and sidecar, and look who leads
    $ctl dev kill $leader
    $ctl leader
    $ctl dev start $leader && $ctl status

  More trouble
    $ctl dev partition r2 r3; $ctl dev heal
    $ctl dev wipe $follower && $ctl dev start $follower
    $ctl leader transfer --to r2
    $ctl log read --limit 20

TEXT
if [ -t 1 ]; then
	echo "Ctrl-C takes everything down. The last rows written:"
	tail -n 2 -F "$dir/workload.log" 2>/dev/null || true
else
	echo "The sandbox stays until: make demo-down"
fi
