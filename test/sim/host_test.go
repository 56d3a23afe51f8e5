package sim

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"time"

	"quorate/paxosgroup"
	"quorate/paxosgroup/peer"
	"quorate/paxosgroup/runner"
	"quorate/paxosgroup/slotlog"
	"quorate/paxosgroup/slotlog/simdisk"
)

const (
	tick         = 10 * time.Millisecond
	logDir       = "log"
	segmentBytes = 8 << 10
	windowSlots  = 32
	windowBytes  = 4 << 10
)

// host is one machine: a disk, a clock, and while it is up a process with the
// production engine and slot log.
type host struct {
	w      *world
	id     paxosgroup.ReplicaID
	region string
	disk   *simdisk.Disk
	engine *runner.Engine // nil while down
	log    *slotlog.Log
	life   int  // grows with every end of the process
	gone   bool // for good

	ppm         int64 // of its clock
	offset      paxosgroup.Instant
	pausedUntil time.Duration
	backlog     []peer.GroupMessage
	wakeAt      time.Duration // of the timer that is set
	flushing    bool          // one is planned
	shortUntil  time.Duration // its disk has no room until then
	stepping    bool

	views []view // by group
}

// view is what was seen of one group of a host.
type view struct {
	delivered  paxosgroup.Slot // in this life
	leaseUntil paxosgroup.Instant
	promised   paxosgroup.Ballot                     // highest seen
	vouched    paxosgroup.Ballot                     // highest that a message it sent rests on; outlives the process
	held       map[paxosgroup.Slot]paxosgroup.Ballot // accepted there and flushed; outlives the process
	looks      int
}

func (w *world) addHost(id paxosgroup.ReplicaID, region string) *host {
	if int(id) != len(w.hosts)+1 {
		panic(fmt.Sprintf("host %d is to follow host %d", id, len(w.hosts)))
	}
	h := &host{
		w: w, id: id, region: region, disk: simdisk.New(w.rng.Uint64()),
		offset: paxosgroup.Instant(time.Hour + w.random(time.Hour)), views: make([]view, len(w.groups)),
	}
	if w.ppmMax > 0 {
		h.ppm = w.rng.Int64N(2*w.ppmMax+1) - w.ppmMax
	}
	w.hosts = append(w.hosts, h)
	h.start()
	return h
}

func (h *host) clock() paxosgroup.Instant { return h.clockAt(h.w.now) }

func (h *host) clockAt(t time.Duration) paxosgroup.Instant {
	return h.offset + paxosgroup.Instant(t) + paxosgroup.Instant(int64(t)*h.ppm/1_000_000)
}

// when is about the time at which h's clock shows d, not before.
func (h *host) when(d paxosgroup.Instant) time.Duration {
	left := int64(d - h.clock())
	return max(h.w.now, h.w.now+time.Duration(left+int64(math.Abs(float64(left)*float64(h.ppm)/1e6))+1))
}

// wall is the wall clock, which some other machine keeps right.
func (h *host) wall() time.Time { return time.Unix(1_700_000_000, 0).Add(h.w.now) }

func (h *host) up() bool { return h.engine != nil && h.w.now >= h.pausedUntil }

func (h *host) group(g paxosgroup.GroupID) *runner.EngineGroup { return h.engine.Group(g) }

func (h *host) view(g paxosgroup.GroupID) *view { return &h.views[g-1] }

// start starts the process. With a disk that will not have it, it tries again.
func (h *host) start() {
	w := h.w
	h.wakeAt, h.flushing, h.backlog, h.pausedUntil = 0, false, nil, 0
	w.note(1, uint64(h.id), uint64(w.now))
	log, restored, err := slotlog.Open(slotlog.Config{Dir: logDir, SegmentBytes: w.segmentBytes, FS: h.disk, Manual: true})
	if err != nil {
		if w.now < h.shortUntil || errors.Is(err, slotlog.ErrFull) {
			life := h.life
			w.after(300*time.Millisecond, func() {
				if h.life == life && h.engine == nil && !h.gone {
					h.start()
				}
			})
			return
		}
		w.fail("host %d does not come up: %w", h.id, err)
		return
	}
	cfg := runner.Config{Log: keeper{h, log}, Restored: restored, Transport: postman{h}, Life: h.beatLife()}
	for _, c := range w.groups {
		core := paxosgroup.Config{
			Group: c.id, ID: h.id, Region: h.region, Seed: w.rng.Uint64(),
			WindowSlotsMax: windowSlots, WindowBytesMax: windowBytes, TickInterval: tick, ClockDriftPPMMax: 1000,
		}
		if w.tune != nil {
			w.tune(&core)
		}
		// One that joins later learns from there what became of it, or from the log
		// alone.
		bootstrap := w.first
		if !isMember(w.first, h.id) && h.id%2 == 0 {
			bootstrap = paxosgroup.Membership{}
		}
		cfg.Groups = append(cfg.Groups, runner.GroupConfig{Core: core, Bootstrap: bootstrap, RecentEntriesMax: 16, WaitingMax: 64})
	}
	for _, c := range w.groups {
		c.restarted(h, restored[c.id])
	}
	h.log = log
	engine, err := runner.NewEngine(cfg, h.clock())
	if err != nil {
		w.fail("host %d does not come up: %w", h.id, err)
		return
	}
	h.engine = engine
	for _, c := range w.groups {
		v := h.view(c.id)
		v.delivered, v.leaseUntil = h.group(c.id).Chosen(), 0
		h.group(c.id).SetIncarnation(paxosgroup.Incarnation(uint64(h.id)<<32 + uint64(h.life)))
	}
	h.turn(func(paxosgroup.Instant) {})
}

// beatLife is the number of this life that shared heartbeats carry; 0 in a world
// where each group sends its own.
func (h *host) beatLife() uint64 {
	if !h.w.shared {
		return 0
	}
	return h.w.rng.Uint64() | 1
}

// end ends the process; what it wrote is there, flushed or not.
func (h *host) end() {
	h.w.note(2, uint64(h.id), uint64(h.w.now))
	h.engine, h.log = nil, nil
	h.life++
	h.disk.SetFault(nil)
	h.disk.Kill()
	for i := range h.views {
		h.views[i].leaseUntil = 0
	}
}

// crash is a power failure.
func (h *host) crash() {
	h.end()
	h.disk.Crash()
}

// startAfter starts the process again, if nobody did before.
func (h *host) startAfter(d time.Duration) {
	life := h.life
	h.w.after(d, func() {
		if h.life == life && h.engine == nil && !h.gone {
			h.start()
		}
	})
}

// turn has the process do something, and then all that is due.
func (h *host) turn(do func(now paxosgroup.Instant)) {
	if h.engine == nil || h.stepping {
		return
	}
	h.stepping = true
	defer func() { h.stepping = false }()
	now := h.clock()
	h.engine.Wall(now, h.wall())
	do(now)
	for range 100 {
		if err := h.engine.Step(now); err != nil {
			// A log that failed stops the process; what supervises it starts it again.
			h.w.refused++
			h.end()
			h.startAfter(100*time.Millisecond + h.w.random(time.Second))
			return
		}
		h.observe()
		next, ok := h.engine.Deadline()
		if !ok {
			return
		}
		if next > now {
			h.wake(h.when(next))
			return
		}
	}
	h.w.fail("host %d has something to do at %v without end", h.id, h.w.now)
}

// observe checks what the process shows.
func (h *host) observe() {
	for _, c := range h.w.groups {
		c.observe(h, h.group(c.id), h.view(c.id))
	}
}

// wake sets the timer, which is never early.
func (h *host) wake(at time.Duration) {
	if h.wakeAt > h.w.now && h.wakeAt <= at {
		return
	}
	at += h.w.random(time.Millisecond)
	h.wakeAt = at
	life := h.life
	h.w.after(at-h.w.now, func() {
		if h.life != life || h.wakeAt != at {
			return
		}
		h.wakeAt = 0
		if h.w.now < h.pausedUntil {
			h.wake(h.pausedUntil)
			return
		}
		h.turn(h.takeBacklog)
	})
}

// takeBacklog hands over what arrived during a pause.
func (h *host) takeBacklog(now paxosgroup.Instant) {
	backlog := h.backlog
	h.backlog = nil
	for i := range backlog {
		h.engine.Deliver(now, backlog[i].Message.From, backlog[i:i+1])
	}
}

func (h *host) deliver(m peer.GroupMessage) {
	h.turn(func(now paxosgroup.Instant) {
		h.takeBacklog(now)
		h.engine.Deliver(now, m.Message.From, []peer.GroupMessage{m})
	})
}

// pause stops the process for a while, its disk and its timers with it.
func (h *host) pause(d time.Duration) {
	h.pausedUntil = max(h.pausedUntil, h.w.now+d)
	h.wake(h.pausedUntil)
}

// suspend stops the machine, and its clock misses the time.
func (h *host) suspend(d time.Duration) {
	h.pausedUntil = h.w.now + d
	h.offset -= paxosgroup.Instant(d)
	for i := range h.views {
		// It believes nothing while it does not run, and looks at the wall clock
		// before it believes again.
		h.views[i].leaseUntil = 0
	}
	h.wakeAt = 0
	h.wake(h.pausedUntil)
}

// postman is a host's runner.Transport.
type postman struct{ h *host }

func (p postman) Send(g paxosgroup.GroupID, msgs []paxosgroup.Message) { p.h.w.sendAll(p.h, g, msgs) }

// keeper is a host's runner.Log: the production log, flushed when the world says.
type keeper struct {
	h   *host
	log *slotlog.Log
}

func (k keeper) Group(g paxosgroup.GroupID) paxosgroup.Storage { return k.log.Group(g) }

func (k keeper) Append(g paxosgroup.GroupID, recs []paxosgroup.Record, durable func(error)) {
	c, kept := k.h.w.group(g), slices.Clone(recs) // which are filled again meanwhile
	for i := range recs {
		if e := &recs[i].Entry; recs[i].Kind == paxosgroup.RecordAccept && e.Kind == paxosgroup.KindData && e.Term == recs[i].Ballot && e.Term.Replica == k.h.id {
			c.offered(*e)
		}
	}
	k.log.Append(g, recs, func(err error) {
		if err == nil {
			c.flushed(k.h, kept)
		}
		durable(err)
	})
	k.h.planFlush()
}

// planFlush has what was appended flushed in a while.
func (h *host) planFlush() {
	if h.flushing {
		return
	}
	h.flushing = true
	life := h.life
	h.w.after(h.w.random(h.w.flushMax), func() { h.flush(life) })
}

func (h *host) flush(life int) {
	if h.life != life || h.log == nil {
		return
	}
	if h.w.now < h.pausedUntil {
		h.w.after(h.pausedUntil-h.w.now, func() { h.flush(life) })
		return
	}
	h.flushing = false
	h.turn(func(paxosgroup.Instant) { h.log.Flush() })
	if h.engine != nil && h.w.now < h.shortUntil+lookForRoom {
		// A log that waits for room looks for it again and again.
		h.w.after(lookForRoom, func() {
			if h.life == life {
				h.planFlush()
			}
		})
	}
}

const lookForRoom = 100 * time.Millisecond
