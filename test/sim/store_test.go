package sim

import (
	"bytes"
	"fmt"
	"time"

	"github.com/anishathalye/porcupine"

	"quorate/paxosgroup"
	"quorate/paxosgroup/runner"
)

// store is a database of registers as the effective entries of a log make it. It
// keeps every version, so that any host's state is a look-up at the slot up to
// which it has applied.
type store struct {
	versions  [storeKeys][]version
	effective map[operationID]paxosgroup.Slot
	err       error
}

const storeKeys = 3

type version struct {
	slot  paxosgroup.Slot
	value int
}

// operationID names a write, however often it is proposed.
type operationID struct{ session, sequence uint64 }

func newStore() *store { return &store{effective: map[operationID]paxosgroup.Slot{}} }

func encodeWrite(id operationID, key, value, size int) []byte {
	return fmt.Appendf(nil, "w %d %d %d %d %0*d", id.session, id.sequence, key, value, size, 0)
}

// apply takes in an effective entry.
func (s *store) apply(d paxosgroup.Delivered) {
	var id operationID
	var key, value int
	if n, _ := fmt.Sscanf(string(d.Entry.Payload), "w %d %d %d %d", &id.session, &id.sequence, &key, &value); n != 4 {
		return
	}
	if before, twice := s.effective[id]; twice {
		s.err = fmt.Errorf("write %d of session %d is effective in slots %d and %d", id.sequence, id.session, before, d.Slot)
	}
	s.effective[id] = d.Slot
	s.versions[key] = append(s.versions[key], version{d.Slot, value})
}

// at returns a register as of a slot.
func (s *store) at(key int, slot paxosgroup.Slot) int {
	vs := s.versions[key]
	for i := len(vs) - 1; i >= 0; i-- {
		if vs[i].slot <= slot {
			return vs[i].value
		}
	}
	return 0
}

// client makes one operation after the other, and keeps what it saw of them.
type client struct {
	w     *world
	check *groupCheck
	id    int
	next  uint64 // sequence

	now     *operation
	host    *host // that it waits at
	life    int
	slot    paxosgroup.Slot // a read's, with hasSlot: to be applied before it is answered
	hasSlot bool
	tries   int
	stopped bool
	history []*operation
}

type operation struct {
	client     int
	id         operationID // a write's
	key, value int
	read       bool
	how        string
	call, done time.Duration // done: 0 if it is not known
}

const clientThinks = 80 * time.Millisecond

func (w *world) addClient(c *groupCheck) *client {
	cl := &client{w: w, check: c, id: len(w.clients) + 1}
	w.clients = append(w.clients, cl)
	cl.think()
	return cl
}

func (cl *client) think() {
	cl.w.after(cl.w.random(2*clientThinks), func() {
		if cl.stopped || cl.now != nil {
			return
		}
		o := &operation{client: cl.id, key: cl.w.rng.IntN(storeKeys), call: cl.w.now}
		cl.now, cl.tries = o, 0
		cl.history = append(cl.history, o)
		if o.read = cl.w.rng.IntN(2) == 0; !o.read {
			cl.next++
			o.id, o.value = operationID{uint64(cl.id), cl.next}, cl.id*1_000_000+int(cl.next)
		}
		cl.attempt(o)
	})
}

// ask has an idle client of the group read at a host at once.
func (c *groupCheck) ask(h *host) {
	for _, cl := range c.w.clients {
		if cl.check == c && cl.now == nil && !cl.stopped {
			o := &operation{client: cl.id, key: c.w.rng.IntN(storeKeys), call: c.w.now, read: true}
			cl.now, cl.tries = o, 0
			cl.history = append(cl.history, o)
			cl.attemptAt(o, h)
			return
		}
	}
}

// believer returns a host that believes it leads, whoever else does.
func (c *groupCheck) believer() *host {
	var some []*host
	for _, h := range c.w.hosts {
		if h.up() && h.group(c.id).Brief().Role == paxosgroup.Leader {
			some = append(some, h)
		}
	}
	if len(some) == 0 {
		return nil
	}
	return some[c.w.rng.IntN(len(some))]
}

// attempt tries the operation at some host.
func (cl *client) attempt(o *operation) {
	w := cl.w
	if cl.now != o {
		return
	}
	if cl.tries++; cl.tries > 30 || w.now > o.call+4*clientPatience {
		cl.giveUp(o)
		return
	}
	h := cl.check.believer()
	if h == nil || w.rng.IntN(4) == 0 {
		h = w.hosts[w.rng.IntN(len(w.hosts))]
	}
	cl.attemptAt(o, h)
}

func (cl *client) attemptAt(o *operation, h *host) {
	w := cl.w
	if !h.up() {
		cl.again(o)
		return
	}
	cl.host, cl.life, cl.hasSlot = h, h.life, false
	if o.read {
		h.turn(func(now paxosgroup.Instant) { cl.read(o, h, now) })
	} else {
		h.turn(func(paxosgroup.Instant) { cl.write(o, h) })
	}
	// Whoever hears nothing for long asks elsewhere.
	tries := cl.tries
	w.after(clientPatience, func() {
		if cl.now == o && cl.tries == tries {
			cl.attempt(o)
		}
	})
}

func (cl *client) again(o *operation) {
	cl.host = nil
	cl.w.after(50*time.Millisecond, func() { cl.attempt(o) })
}

func (cl *client) giveUp(o *operation) {
	cl.now, cl.host = nil, nil
	cl.think()
}

func (cl *client) write(o *operation, h *host) {
	p := &runner.Proposal{
		Payload: encodeWrite(o.id, o.key, o.value, cl.w.rng.IntN(100)), Session: o.id.session, Sequence: o.id.sequence,
	}
	tries := cl.tries
	p.Wait = cl.w.rng.IntN(2) == 0
	p.Answered = func(p *runner.Proposal) {
		switch {
		case p.Err == nil && p.Wait:
			cl.told(o)
		case p.Err == nil:
		case cl.now == o && cl.tries == tries:
			cl.again(o)
		}
	}
	cl.check.proposed[string(p.Payload)] = true
	h.group(cl.check.id).Propose(p)
}

// told is called when the host says that a write is effective, wherever the
// client waits by now.
func (cl *client) told(o *operation) {
	cl.check.acknowledged = append(cl.check.acknowledged, o.id)
	if cl.now != o {
		return
	}
	o.done = cl.w.now
	cl.now, cl.host = nil, nil
	cl.think()
}

// applied tells clients of a group that wait at a host that it has applied more.
func (w *world) applied(h *host, c *groupCheck) {
	if c.kv.err != nil {
		c.fail("%w", c.kv.err)
	}
	for _, cl := range w.clients {
		if cl.check == c && cl.host == h && cl.life == h.life && cl.now != nil {
			cl.look()
		}
	}
}

// look completes the operation if its host has applied what it takes.
func (cl *client) look() {
	o, delivered := cl.now, cl.host.view(cl.check.id).delivered
	if o.read {
		if !cl.hasSlot || delivered < cl.slot {
			return
		}
		o.value = cl.check.kv.at(o.key, delivered)
	} else if slot, ok := cl.check.kv.effective[o.id]; !ok || slot > delivered {
		return
	}
	o.done = cl.w.now
	cl.w.note(4, uint64(cl.id), uint64(o.value))
	cl.now, cl.host = nil, nil
	cl.think()
}

type registerInput struct {
	write bool
	value int
}

var registerModel = porcupine.Model{
	Init: func() any { return 0 },
	Step: func(state, input, output any) (bool, any) {
		if in := input.(registerInput); in.write {
			return true, in.value
		}
		return output.(int) == state.(int), state
	},
	Equal: func(a, b any) bool { return a == b },
}

// linearizable checks what the clients of a group saw, register by register.
func (c *groupCheck) linearizable() error {
	var ops [storeKeys][]porcupine.Operation
	for _, cl := range c.w.clients {
		if cl.check != c {
			continue
		}
		for _, o := range cl.history {
			done := int64(o.done)
			if o.done == 0 {
				if _, ok := c.kv.effective[o.id]; o.read || !ok {
					continue // nobody has seen it, and nobody will
				}
				done = int64(c.w.now) + 1
			}
			op := porcupine.Operation{ClientId: o.client, Call: int64(o.call), Return: done}
			if o.read {
				op.Input, op.Output = registerInput{}, o.value
			} else {
				op.Input = registerInput{write: true, value: o.value}
			}
			ops[o.key] = append(ops[o.key], op)
		}
	}
	for _, id := range c.acknowledged {
		if _, ok := c.kv.effective[id]; !ok {
			return fmt.Errorf("group %d: write %d of session %d was acknowledged, and is not effective", c.id, id.sequence, id.session)
		}
	}
	for _, payload := range c.confirmed {
		if !c.effective[payload] {
			return fmt.Errorf("group %d: %.20q was confirmed, and is not effective", c.id, payload)
		}
	}
	for key, history := range ops {
		if porcupine.CheckOperationsTimeout(registerModel, history, 20*time.Second) == porcupine.Illegal {
			return fmt.Errorf("group %d: what clients saw of register %d is not linearizable: %d operations%s", c.id, key, len(history), c.showHistory(key))
		}
	}
	return nil
}

func (c *groupCheck) showHistory(key int) string {
	out := ""
	for _, cl := range c.w.clients {
		for _, o := range cl.history {
			if cl.check == c && o.key == key {
				out += fmt.Sprintf("\n  client %d  %8d to %8d us  read %v (%s)  value %d", o.client, o.call.Microseconds(), o.done.Microseconds(), o.read, o.how, o.value)
			}
		}
	}
	return out
}

// offered takes in what a leader hands to its log as its own, in the order in
// which it does.
func (c *groupCheck) offered(e paxosgroup.Entry) {
	if !c.proposed[string(e.Payload)] {
		c.fail("term %v: entry %d, %.20q, was proposed by nobody", e.Term, e.Number, e.Payload)
	}
	if have := c.order.offers[e.Term]; e.Number >= 1 && int(e.Number) <= len(have) && bytes.Equal(have[e.Number-1], e.Payload) {
		return // once more, behind an image
	}
	if err := c.order.offer(e.Term, e.Number, e.Payload); err != nil {
		c.fail("%w", err)
	}
}
