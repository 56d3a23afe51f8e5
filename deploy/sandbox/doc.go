// Package sandbox runs a whole cluster on one machine, as `paxosctl dev`: for
// each region a real PostgreSQL server and a sidecar, as processes of their
// own, and between the regions relays that give every connection the delay of
// real places and can be cut.
//
// Always true:
//
//   - All state lies in the sandbox's directory; sandbox.json in it records
//     every port and option, so that a second Up goes on with the same cluster.
//     The one exception: as root, when the operating-system user postgres
//     cannot enter that directory (/root, say), the servers' directories lie
//     under /var/tmp/quorate-HASH, which sandbox.json names.
//   - One supervisor at a time holds the directory (flock on sandbox.lock). It
//     is the parent of all processes, hosts the relays, and answers on the unix
//     socket sandbox.sock. Client speaks to it.
//   - Nothing outlives the supervisor, however it ends: sidecars and servers
//     are started with a parent-death signal. What may still be left of a
//     supervisor killed with kill -9 is found by the recorded pid and start
//     time, or by its working directory, and ended by the next Up or Down.
//   - A sidecar reaches another region only by a relay: its configuration holds
//     the relays' addresses where it names other regions (see purposes).
//   - An operation returns when its effect is there: a killed process is gone, a
//     paused one is stopped, over a cut connection no byte arrives any more.
//
// The sandbox injects faults from outside only: signals, the relays, and the
// removal of files. A sidecar that ends by itself stays down until Start; the
// status says so.
package sandbox
