// Package relay stands for the network between the regions of a sandbox: TCP
// relays that give each direction of a connection its share of a real round
// trip, and that can be slowed and cut. The product itself holds no delay and no fault.
//
// What a Wire, the connection of two regions, does to a Relay on it:
//
//   - Every byte arrives one way's delay after it was read, in order, whatever
//     follows it: a delay line, not stop and wait, so a pipeline fills the wire
//     as it would a long one. The first byte of a new connection waits a round
//     trip more, as the handshake of TCP takes.
//   - Delays are kept by timerfd. The runtime's own timers sleep in whole
//     milliseconds when a process is idle, which at 12 ms is an error of 8 %.
//   - A direction holds at most lineBytesMax; beyond it nothing is read, and
//     the sender feels it as it would a full window.
//   - With a rate, so many bytes a second pass in each direction, of all
//     connections over the wire together. What waits fills the kernel's buffers
//     and, with a delay, the delay line.
//   - Cut, a wire is silent: nothing arrives, nothing is refused, and neither
//     end is told. A new connection is taken and hears nothing. When the wire
//     is mended, what was held arrives one way later, and so do endings that
//     came meanwhile; a real network would lose the packets and the ends would
//     send them again, to the same result but for the time. So an old leader's
//     messages do arrive late, and nobody has to reconnect.
//   - Cut returns when no byte can arrive any more.
//
// An end of input is passed on as such (half-close), a reset as a reset, both
// with the delay of the bytes before them.
package relay
