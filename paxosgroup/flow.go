package paxosgroup

import (
	"time"
)

// flow is what a leader has on its way to one follower, and how much that may
// be. The window follows BBR (Cardwell, Cheng, Gunn, Yeganeh and Jacobson, "BBR:
// Congestion-Based Congestion Control", ACM Queue 14(5), 2016): the greatest
// rate lately delivered times the least round trip lately seen, twice, so that a
// rate that has risen shows itself. The rate is measured as in Cheng, Cardwell,
// Yeganeh and Jacobson, "Delivery Rate Estimation" (an Internet draft, 2017).
//
// Three things differ, because acknowledgements come by way of a flush:
//
//   - Acknowledgements come in bursts, one a flush. What the rate delivers in
//     flowSlack is allowed on top of two round trips.
//   - Loads are uneven, and a rate at which little was asked for says little
//     about the link. A sample below the estimate counts only if the answer was
//     late and more than the floor was under way: there was a queue then, and the
//     rate is that of the link.
//   - A fall of the rate shows only when answers come. Until then nothing is sent
//     behind what has been under way for flowStallRoundTrips and flowStall.
//
// Between two sidecars messages keep their order, so an answer to one that was
// sent later proves an earlier one lost. Nothing is sent again without such a
// proof: where no answer comes, an Accept without entries asks for it.
type flow struct {
	next    Slot // the lowest one never sent in this leadership, or lower
	flights []sentAccept
	again   []span // proved lost, to be sent again
	slots   int    // of flights
	bytes   int    // of flights

	stamp    Instant // of the last Accept sent; no two have the same
	answered Instant // the newest stamp that an answer told of
	probeAt  Instant // when to ask, if nothing is heard until then
	probes   int     // since the last answer
	limited  bool    // by the link, and not by what was asked of it
	behind   bool    // it refused what is too far above its chosen prefix, and first catches up

	delivered      uint64 // bytes answered, ever
	deliveredSlots uint64
	deliveredAt    Instant
	rate, slotRate highest // per second
	roundTrip      lowest
	lastRoundTrip  time.Duration
	cleanAt        Instant // last time that a round trip was measured with nothing else under way
}

// sentAccept is one Accept under way. Its stamp is what the follower echoes.
type sentAccept struct {
	span
	slots, bytes   int
	stamp          Instant
	behindIt       int    // bytes under way, itself included, when it was sent
	delivered      uint64 // as of its sending
	deliveredSlots uint64
	deliveredAt    Instant
}

type span struct{ first, last Slot }

const (
	flowGain            = 2
	flowSlack           = 50 * time.Millisecond
	flowStall           = 50 * time.Millisecond
	flowStallRoundTrips = 4
	flowFloorBytes      = 16 << 10
	flowFloorSlots      = 64
	flowFirstBytes      = 1 << 20 // before anything was measured
	flowRatePeriod      = 500 * time.Millisecond
	flowRoundTripPeriod = 10 * time.Second
	flowEntryBytes      = 64 // on the wire, beside the payload
	flowProbesMax       = 5  // the interval doubles no further
)

// highest is a maximum over the last one to two periods.
type highest struct {
	since     Instant
	now, last float64
}

func (h *highest) get() float64 { return max(h.now, h.last) }

func (h *highest) add(at Instant, v float64, period time.Duration) {
	if at >= h.since.Add(period) {
		h.since, h.last, h.now = at, h.now, 0
	}
	h.now = max(h.now, v)
}

// lowest is a minimum over the last one to two periods.
type lowest struct {
	since     Instant
	now, last time.Duration // 0: none
}

func (l *lowest) get() time.Duration {
	if l.now == 0 || l.last != 0 && l.last < l.now {
		return l.last
	}
	return l.now
}

func (l *lowest) add(at Instant, v time.Duration, period time.Duration) {
	if at >= l.since.Add(period) {
		l.since, l.last, l.now = at, l.now, 0
	}
	if l.now == 0 || v < l.now {
		l.now = v
	}
}

// begin starts a leadership whose first slot is next. What is known of the link
// stays known.
func (f *flow) begin(next Slot) {
	f.next, f.flights, f.again, f.slots, f.bytes = next, nil, nil, 0, 0
	f.probes, f.behind = 0, false
}

// late is by when an answer shows that something was queued on the way.
func (f *flow) late() time.Duration { return flowGain*f.roundTrip.get() + flowSlack }

// window returns how much may be under way. A link that has not been seen to be
// the limit is held to what a new one gets, or more: that little was asked of it
// is no reason to begin slowly.
func (f *flow) window(cfg *Config) (slots, bytes int) {
	slots, bytes = flowFloorSlots, flowFloorBytes
	if !f.limited {
		slots, bytes = cfg.WindowSlotsMax, flowFirstBytes
	}
	seconds := f.late().Seconds()
	slots = min(max(slots, int(f.slotRate.get()*seconds)), cfg.FollowerSlotsMax)
	bytes = min(max(bytes, int(f.rate.get()*seconds)), cfg.FollowerBytesMax)
	return slots, bytes
}

// room returns how much may be sent to p now. One Accept goes to an empty link
// whatever its size.
func (r *Replica) room(p *peer) (slots, bytes int) {
	f := &p.flow
	if f.behind {
		return 0, 0
	}
	slots, bytes = f.window(&r.cfg)
	if len(f.flights) == 0 {
		return slots, bytes
	}
	if r.now.Sub(f.flights[0].stamp) > flowStallRoundTrips*f.roundTrip.get()+flowStall {
		return 0, 0
	}
	// Now and then what is under way is let run out, to see the round trip
	// without it; not to all at the same time.
	if f.limited && r.now > f.cleanAt.Add(flowRoundTripPeriod+time.Duration(p.id%8)*time.Second) {
		return 0, 0
	}
	return slots - f.slots, bytes - f.bytes
}

// sent takes note of an Accept and returns its stamp.
func (f *flow) sent(now Instant, s span, slots, bytes int, wait time.Duration) Instant {
	f.stamp = max(now, f.stamp+1)
	if len(f.flights) == 0 {
		f.deliveredAt = now
		f.probeAt, f.probes = now.Add(wait), 0
	}
	f.slots += slots
	f.bytes += bytes
	f.flights = append(f.flights, sentAccept{
		span: s, slots: slots, bytes: bytes, stamp: f.stamp, behindIt: f.bytes,
		delivered: f.delivered, deliveredSlots: f.deliveredSlots, deliveredAt: f.deliveredAt,
	})
	return f.stamp
}

// answer takes in that the follower has dealt with all Accepts up to stamp. It
// returns them, as far as they are not known to have been.
func (f *flow) answer(now Instant, stamp Instant) []sentAccept {
	if stamp <= f.answered || stamp > f.stamp {
		return nil
	}
	f.answered, f.probes = stamp, 0
	n := 0
	for n < len(f.flights) && f.flights[n].stamp <= stamp {
		f.slots -= f.flights[n].slots
		f.bytes -= f.flights[n].bytes
		f.delivered += uint64(f.flights[n].bytes)
		f.deliveredSlots += uint64(f.flights[n].slots)
		n++
	}
	if n == 0 {
		return nil
	}
	f.deliveredAt = now
	if last := f.flights[n-1]; last.stamp == stamp && now > stamp {
		f.measure(now, last)
	}
	done := f.flights[:n:n]
	f.flights = f.flights[n:]
	return done
}

func (f *flow) measure(now Instant, last sentAccept) {
	took := now.Sub(last.stamp)
	f.lastRoundTrip = took
	if last.behindIt == last.bytes {
		f.cleanAt = now
		f.roundTrip.add(now, took, flowRoundTripPeriod)
	} else if r := f.roundTrip.get(); r == 0 || took < r {
		f.roundTrip.add(now, took, flowRoundTripPeriod)
	}
	seconds := now.Sub(last.deliveredAt).Seconds()
	if seconds <= 0 {
		return
	}
	queued := took > f.late() && last.behindIt > flowFloorBytes
	f.limited = f.limited || queued
	if rate := float64(f.delivered-last.delivered) / seconds; queued || rate > f.rate.get() {
		f.rate.add(now, rate, flowRatePeriod)
	}
	if rate := float64(f.deliveredSlots-last.deliveredSlots) / seconds; queued || rate > f.slotRate.get() {
		f.slotRate.add(now, rate, flowRatePeriod)
	}
	if f.rate.get()*f.late().Seconds() >= flowFirstBytes {
		f.limited = false
	}
}

// hedgeDelay is for how long entries are held that a follower outside the
// nearest quorum is to be sent.
const hedgeDelay = time.Millisecond

// sendAccepts sends each follower what it has not been sent, as far as its
// window is open. What is chosen and no longer at hand it fetches. Followers that
// are sent the same share the entries.
//
// The nearest quorum is sent to at once, the others a little later, so that they
// get what gathers meanwhile in one message, with the news that it is chosen. If
// one of the nearest does not answer, hedgeDelay is what it costs. (Moraru,
// Andersen and Kaminsky, "There is more consensus in egalitarian parliaments",
// SOSP 2013, call it thrifty; Dean and Barroso, "The tail at scale", CACM 56(2),
// 2013, hedge requests.)
func (r *Replica) sendAccepts() {
	l := &r.lead
	at := l.hedgeAt
	due := at != 0 && r.now >= at
	l.hedgeAt = 0
	nearest := r.nearestQuorum()
	for _, p := range r.peers {
		f := &p.flow
		if f.next <= r.chosen && (len(l.tail.entries) == 0 || f.next < l.tail.entries[0].Slot) {
			f.next = r.chosen + 1
		}
		if nearest&(1<<p.index) == 0 && !due && len(f.again) == 0 && f.next < l.next && l.next-f.next < acceptSlotsMax {
			if at == 0 {
				at = r.now.Add(hedgeDelay)
			}
			l.hedgeAt = at
			continue
		}
		for len(f.again) > 0 || f.next < l.next {
			slots, bytes := r.room(p)
			if slots <= 0 || bytes <= 0 {
				break
			}
			if len(f.again) > 0 {
				if !r.sendAgain(p, slots, bytes) {
					break
				}
				continue
			}
			chunk, size := r.gather(f.next).cut(slots, bytes, len(f.flights) == 0)
			if len(chunk) == 0 {
				break
			}
			f.next = chunk[len(chunk)-1].Slot + 1
			r.sendAccept(p, chunk, size)
		}
	}
	r.trimTail()
}

// nearestQuorum returns the members that are sent entries at once: the fewest
// that make a phase-2 quorum with this replica, by least round trip, among those
// that answer as they use to. Without such a quorum it is everybody.
func (r *Replica) nearestQuorum() uint64 {
	const everybody = ^uint64(0)
	if r.lead.change != nil || r.lead.transfer != nil || r.self < 0 {
		return everybody
	}
	var order [membersMax]*peer
	n := 0
	for _, p := range r.peers {
		f := &p.flow
		late := len(f.flights) > 0 && r.now.Sub(f.flights[0].stamp) > flowGain*max(f.roundTrip.get(), f.lastRoundTrip)+2*hedgeDelay
		if f.roundTrip.get() == 0 || late || f.behind || r.voters&(1<<p.index) == 0 {
			continue
		}
		// Peers are in order of id, and round trips as good as equal do not
		// change it: whoever was nearest stays so.
		i := n
		for ; i > 0 && nearness(order[i-1]) > nearness(p); i-- {
			order[i] = order[i-1]
		}
		order[i] = p
		n++
	}
	set := uint64(1) << r.self
	for _, p := range order[:n] {
		set |= 1 << p.index
		if r.quorums.phase2(set) {
			return set
		}
	}
	return everybody
}

// nearness is a round trip to the nearest quarter of a millisecond.
func nearness(p *peer) time.Duration {
	return p.flow.roundTrip.get().Round(250 * time.Microsecond)
}

// tail is what was proposed last in this leadership, in slots without a gap: all
// that is undecided, and of what is chosen as much as some follower is to be sent
// yet. Messages share its entries, which are never changed.
type tail struct {
	entries     []SlotEntry
	chosenBytes int // of payload, in entries that are chosen
}

const (
	tailSlotsMax = 2 * acceptSlotsMax // chosen
	tailBytesMax = 2 * acceptBytesMax // chosen
	tailRoom     = 256                // entries for which room is made at a time
)

func (t *tail) add(e SlotEntry) {
	n := len(t.entries)
	if n > 0 && t.entries[n-1].Slot+1 != e.Slot {
		*t, n = tail{}, 0
	}
	if n == cap(t.entries) {
		// What is in use moves; what was in front of it goes with the last message
		// that holds it.
		t.entries = append(make([]SlotEntry, 0, 2*n+tailRoom), t.entries...)
	}
	t.entries = append(t.entries, e)
}

// trimTail lets go of what is chosen and was sent to all who keep up.
func (r *Replica) trimTail() {
	t := &r.lead.tail
	if len(t.entries) == 0 {
		return
	}
	keep := r.chosen + 1
	for _, p := range r.peers {
		if next := p.flow.next; next < keep && next+tailSlotsMax > r.chosen {
			keep = next
		}
	}
	n := 0
	for ; n < len(t.entries) && t.entries[n].Slot <= r.chosen; n++ {
		if t.entries[n].Slot >= keep && t.chosenBytes <= tailBytesMax {
			break
		}
		t.chosenBytes -= len(t.entries[n].Entry.Payload)
	}
	t.entries = t.entries[n:]
}

// run is entries of consecutive slots.
type run struct {
	entries []SlotEntry
	size    int
}

func entrySize(e *Entry) int { return flowEntryBytes + len(e.Payload) }

// gather returns what was proposed from a slot on, as much as one Accept carries.
func (r *Replica) gather(first Slot) run {
	t := r.lead.tail.entries
	invariant(len(t) > 0 && t[0].Slot <= first && t[len(t)-1].Slot == r.lead.next-1, "slot %d is to be sent up to %d and is not at hand", first, r.lead.next-1)
	t = t[first-t[0].Slot:]
	size, n := 0, 0
	for n < len(t) && n < acceptSlotsMax && size < acceptBytesMax {
		size += entrySize(&t[n].Entry)
		n++
	}
	return run{entries: t[:n:n], size: size}
}

// cut returns the beginning of u that fits, and the first entry anyway if alone.
func (u run) cut(slots, bytes int, alone bool) (chunk []SlotEntry, size int) {
	if len(u.entries) <= slots && u.size <= bytes {
		return u.entries, u.size
	}
	n := 0
	for ; n < min(len(u.entries), slots); n++ {
		w := entrySize(&u.entries[n].Entry)
		if size+w > bytes && !(n == 0 && alone) {
			break
		}
		size += w
	}
	return u.entries[:n:n], size
}

// sendAgain sends the undecided part of what was lost first. It reports false if
// there is no room for it.
func (r *Replica) sendAgain(p *peer, slots, bytes int) bool {
	f := &p.flow
	lost := &f.again[0]
	lost.first = max(lost.first, r.chosen+1)
	var chunk []SlotEntry
	size := 0
	for ; lost.first <= lost.last && len(chunk) < min(slots, acceptSlotsMax); lost.first++ {
		st := r.log.at(lost.first)
		if st == nil || st.ballot != r.ballot || r.acked(st, p) {
			continue
		}
		w := entrySize(&st.entry)
		if size+w > min(bytes, acceptBytesMax) && !(size == 0 && len(f.flights) == 0) {
			break
		}
		chunk = append(chunk, SlotEntry{Slot: lost.first, Entry: st.entry})
		size += w
	}
	done := lost.first > lost.last
	if done {
		f.again = f.again[1:]
	}
	if len(chunk) > 0 {
		r.sendAccept(p, chunk, size)
	}
	return done || len(chunk) > 0
}

func (r *Replica) sendAccept(p *peer, chunk []SlotEntry, size int) {
	f := &p.flow
	first, last := chunk[0].Slot, chunk[len(chunk)-1].Slot
	r.mayPropose(last)
	slots, bytes := f.window(&r.cfg)
	alone := len(f.flights) == 0
	stamp := f.sent(r.now, span{first, last}, len(chunk), size, r.probeTimeout(p))
	invariant(alone || f.slots <= slots && f.bytes <= bytes, "%d slots and %d bytes on the way to replica %d, whose window is %d and %d",
		f.slots, f.bytes, p.id, slots, bytes)
	p.chosenSent = max(p.chosenSent, r.chosen)
	r.send(Message{Kind: MsgAccept, To: p.id, Ballot: r.ballot, Chosen: r.chosen, SentAt: stamp, Entries: chunk})
}

// noteAnswer draws from an Accepted what it says of the link: which Accepts
// have arrived, and which have not.
func (r *Replica) noteAnswer(p *peer, m Message) {
	f := &p.flow
	done := f.answer(r.now, m.SentAt)
	r.noteCaughtUp(p)
	if done == nil {
		return
	}
	f.probeAt = r.now.Add(r.probeTimeout(p))
	if p.chosenSent < r.chosen {
		r.scheduleNotice() // it was passed over while its window was closed
	}
	// Refused is what is too far above what it misses: that is kept for when it
	// has caught up.
	f.behind = f.behind || !m.Granted
	for _, d := range done {
		if k := d.slots; len(m.Slots) >= k && k > 0 && m.Slots[0] == d.first && m.Slots[k-1] == d.last {
			m.Slots = m.Slots[k:] // answered as it was sent, as nearly all are
			continue
		}
		for s := max(d.first, r.chosen+1); s <= d.last; s++ {
			if st := r.log.at(s); st != nil && st.ballot == r.ballot && !r.acked(st, p) {
				f.again = append(f.again, span{s, d.last})
				break
			}
		}
	}
}

// noteCaughtUp draws from what p has as chosen, however it came to know it.
func (r *Replica) noteCaughtUp(p *peer) {
	f := &p.flow
	if f.behind && p.chosen+Slot(r.cfg.WindowSlotsMax) >= r.chosen {
		f.behind = false
	}
	n := 0
	for ; n < len(f.flights) && f.flights[n].last <= p.chosen; n++ {
		f.slots -= f.flights[n].slots
		f.bytes -= f.flights[n].bytes
	}
	f.flights = f.flights[n:]
}

// acked reports whether p is known to have accepted what is proposed in a slot.
func (r *Replica) acked(st *slotState, p *peer) bool { return st.acks&(1<<p.index) != 0 }

// probeTimeout is after how long without an answer a follower is asked for one.
func (r *Replica) probeTimeout(p *peer) time.Duration {
	if p.rtt == 0 && p.flow.lastRoundTrip == 0 {
		return retransmitUnknown
	}
	return min(2*max(p.rtt, p.flow.lastRoundTrip)+retransmitMin, r.cfg.LeaseDuration)
}

// tickFlow asks a follower that has not answered what became of what it was
// sent. A question costs as much as a heartbeat, whatever is on its way. One that
// stays silent is asked less and less often, until it is heard of again.
func (r *Replica) tickFlow(p *peer) {
	f := &p.flow
	if r.lead.next == r.chosen+1 && !f.behind {
		return // it learns by heartbeats what it may miss
	}
	timeout := r.probeTimeout(p)
	if len(f.flights) == 0 && !f.behind {
		// Where messages overtake each other an answer may have been taken for
		// more than it was.
		if st := r.log.at(r.chosen + 1); len(f.again) == 0 && f.next == r.lead.next && r.now >= f.probeAt && st != nil && !r.acked(st, p) {
			f.again = append(f.again, span{r.chosen + 1, f.next - 1})
			f.probeAt = r.now.Add(timeout)
		}
		return
	}
	back := f.probes > 0 && p.lastHeard > f.stamp && r.now >= f.stamp.Add(timeout)
	if r.now < f.probeAt && !back {
		return
	}
	f.stamp = max(r.now, f.stamp+1)
	f.probeAt = r.now.Add(timeout << min(f.probes, flowProbesMax))
	f.probes++
	r.send(Message{Kind: MsgAccept, To: p.id, Ballot: r.ballot, Chosen: r.chosen, SentAt: f.stamp})
}

// status fills in what Status shows of a flow.
func (f *flow) status(cfg *Config, x *PeerStatus) {
	x.InFlight, x.InFlightBytes = f.slots, f.bytes
	x.WindowSlots, x.WindowBytes = f.window(cfg)
	x.RateBytes, x.RateSlots = int64(f.rate.get()), int64(f.slotRate.get())
	x.MinRoundTrip = f.roundTrip.get()
	x.Behind = f.behind
}
