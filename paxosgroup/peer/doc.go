// Package peer carries messages between the sidecars of a cluster over gRPC.
//
// Invariants:
//
//   - Order: what one sidecar sends another arrives in the order of Send, less
//     what was lost. Each direction of a pair has one stream for all groups, and
//     a second one, on a connection of its own, for bulk: chosen entries that
//     are fetched, and large promises. Between the two there is no order, nor
//     does one ever hold up the other.
//   - Send never blocks and never waits to gather a batch: on an idle link the
//     caller itself hands the frame to gRPC, a busy one sends what has gathered
//     meanwhile in one frame. What several peers are sent is encoded once.
//   - Memory is bounded: a peer's queue is, and what does not fit, or meets no
//     connection, is dropped and counted. Paxos repeats what matters; a message
//     kept through an outage would only delay newer ones.
//   - A frame takes memory in proportion to its size, whatever it claims to hold.
//   - No message crosses between clusters, or reaches a replica it is not for: a
//     stream begins with a hello that names both, and every message is checked
//     against it.
//
// A dead link shows within two seconds, by missing replies or by bytes that are
// not acknowledged, and is dialled again after 20 to 500 ms.
//
// Payloads are shared: with the sender's message until it is on the wire, and on
// the receiving side with the frame they came in.
package peer
