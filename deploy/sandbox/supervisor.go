package sandbox

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"quorate/deploy/sandbox/postgres"
)

// Options say what Up shall run. What is nil is as it was recorded, or the
// default in a new sandbox.
type Options struct {
	Dir     string  // made if missing
	Regions *int    // 5; fixed for the life of the sandbox
	WAN     *string // WANNone
	OTLP    *string // an OTLP/gRPC endpoint for the sidecars' traces; "" is none
	Jaeger  *bool   // run Jaeger and send the traces there
	Feed    *bool   // publish the change feed
	// Witnesses and Learners name the regions of these kinds; like the quorums they
	// are fixed once the sandbox is made.
	Witnesses         []string
	Learners          []string
	Phase1, Phase2    *int
	DurabilityRegions *int
	// Settings are laid over each sidecar's configuration, by their dotted keys;
	// a key that begins with a region's name and a colon is for that one only.
	Settings map[string]string

	// QuorateBin is the daemon, started as `quorate run --config FILE`. Empty:
	// $QUORATE_BIN, else the one beside this executable.
	QuorateBin string
	// PostgresBin is the directory of PostgreSQL's programs; empty: see postgres.BinDir.
	PostgresBin string
	// PostgresSettings go to every server, on its command line.
	PostgresSettings map[string]string
	// Progress, if not nil, is told what is being done, a line at a time.
	Progress func(line string)
}

const (
	regionsDefault = 5
	clusterName    = "demo"
	// readyTimeout bounds how long a sandbox may take to have a leader and all
	// regions caught up; a resumed one may have much to catch up with.
	readyTimeout = 3 * time.Minute
	// waitingSaidEvery is how often at most it is told what is waited for.
	waitingSaidEvery = 3 * time.Second
)

// ErrRunning says that a supervisor runs this sandbox already.
var ErrRunning = errors.New("the sandbox runs already")

// Supervisor runs one sandbox in this process. Its methods are safe for
// concurrent use.
type Supervisor struct {
	dir         string
	description *Description
	binDir      string
	lock        *os.File
	spawner     *spawner
	network     *network
	regions     []*region
	jaeger      *process
	jaegerBin   string
	progress    func(string)
	control     *control

	startOnce sync.Once
	started   chan struct{} // closed when the first Start is over
	startErr  error         // of that Start; read after started

	life     context.Context // ends when Down begins: nothing is started any more
	endLife  context.CancelFunc
	downOnce sync.Once
	downErr  error
	down     chan struct{} // closed when all is down
}

// New takes the directory, ends what an earlier supervisor may have left,
// chooses ports, writes every configuration, opens the relays, and answers on
// the control socket. It starts no region. The caller owes a Down.
func New(ctx context.Context, o Options) (_ *Supervisor, err error) {
	dir, err := filepath.Abs(o.Dir)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("make the sandbox's directory: %w", err)
	}
	s := &Supervisor{dir: dir, progress: o.Progress, started: make(chan struct{}), down: make(chan struct{})}
	s.life, s.endLife = context.WithCancel(context.Background())
	if s.progress == nil {
		s.progress = func(string) {}
	}
	if s.lock, err = takeLock(dir); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			s.release()
		}
	}()
	if s.binDir = o.PostgresBin; s.binDir == "" {
		if s.binDir, err = postgres.BinDir(); err != nil {
			return nil, err
		}
	}
	command, err := quorateCommand(o.QuorateBin)
	if err != nil {
		return nil, err
	}
	if s.description, err = describe(dir, o); err != nil {
		return nil, err
	}
	d := s.description
	s.spawner = newSpawner()
	s.regions = regionsOf(dir, d)
	for _, r := range s.regions {
		r.command, r.spawner = command, s.spawner
		r.server.BinDir = s.binDir
		// No unix socket: its path could be too long, and nobody needs it.
		r.server.Settings = map[string]string{"unix_socket_directories": ""}
		maps.Copy(r.server.Settings, o.PostgresSettings)
		r.server.Spawn = func(cmd *exec.Cmd) error { return s.spawner.start(cmd, syscall.SIGQUIT) }
	}
	if err := s.clean(ctx); err != nil {
		return nil, err
	}
	changed, err := d.assignPorts()
	if err != nil {
		return nil, err
	}
	for _, c := range changed {
		s.progress(c)
	}
	if err := d.save(dir); err != nil {
		return nil, fmt.Errorf("record the sandbox: %w", err)
	}
	for _, r := range s.regions {
		r.server.Port = r.Ports["postgres"]
		if err := s.prepare(r); err != nil {
			return nil, fmt.Errorf("prepare %s: %w", r.Name, err)
		}
	}
	if d.Jaeger {
		s.progress("looking for Jaeger, building it if needed (about 2.5 minutes the first time)")
		if s.jaegerBin, err = buildJaeger(ctx); err != nil {
			return nil, err
		}
	}
	if s.network, err = newNetwork(d); err != nil {
		return nil, err
	}
	if s.control, err = serveControl(s); err != nil {
		return nil, err
	}
	return s, nil
}

// regionsOf returns the regions with their places, and without the means to
// start them.
func regionsOf(dir string, d *Description) []*region {
	var regions []*region
	for _, rd := range d.Regions {
		regions = append(regions, &region{
			RegionDescription: rd,
			dir:               filepath.Join(dir, rd.Name),
			server:            &postgres.Server{Dir: filepath.Join(d.PostgresRoot, rd.Name, "postgres")},
		})
	}
	return regions
}

// prepare makes a region's directories and writes its configuration.
func (s *Supervisor) prepare(r *region) error {
	for _, dir := range []string{r.dir, r.logDir(), filepath.Dir(r.server.Dir)} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	// One place for the region's logs, wherever the server's directory is.
	link := filepath.Join(r.logDir(), "postgres.log")
	if at, err := os.Readlink(link); err != nil || at != r.server.LogFile() {
		if err := forget(link); err != nil {
			return err
		}
		if err := os.Symlink(r.server.LogFile(), link); err != nil {
			return err
		}
	}
	return r.writeConfig(s.description, s.binDir, s.otlp())
}

// otlp returns where the sidecars' traces go, empty if nowhere.
func (s *Supervisor) otlp() string {
	if s.description.Jaeger {
		return "http://" + address(s.description.JaegerPorts["otlp"])
	}
	return s.description.OTLP
}

// clean ends what an earlier supervisor left.
func (s *Supervisor) clean(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, stopTimeout)
	defer cancel()
	errs := []error{endRecorded(ctx, s.jaegerPIDFile())}
	for _, r := range s.regions {
		errs = append(errs, r.clean(ctx))
	}
	return errors.Join(errs...)
}

// describe returns the recorded description with the options laid over it, or a
// new one.
func describe(dir string, o Options) (*Description, error) {
	d, err := Load(dir)
	if errors.Is(err, ErrNoSandbox) {
		root, err := postgresRoot(dir)
		if err != nil {
			return nil, err
		}
		count := regionsDefault
		if o.Regions != nil {
			count = *o.Regions
		}
		if count < 1 || count > RegionsMax {
			return nil, fmt.Errorf("regions: %d is not between 1 and %d", count, RegionsMax)
		}
		d = &Description{Version: descriptionVersion, Cluster: clusterName, WAN: WANNone, PostgresRoot: root}
		for i := range count {
			d.Regions = append(d.Regions, &RegionDescription{Name: fmt.Sprintf("r%d", i+1)})
		}
		for kind, names := range map[string][]string{KindWitness: o.Witnesses, KindLearner: o.Learners} {
			for _, name := range names {
				r, err := d.Region(name)
				if err != nil {
					return nil, fmt.Errorf("%s: %w", kind, err)
				}
				if r.Kind != "" {
					return nil, fmt.Errorf("region %s is named as %s and as %s", name, r.Kind, kind)
				}
				r.Kind = kind
			}
		}
		if o.Phase1 != nil {
			d.Phase1 = *o.Phase1
		}
		if o.Phase2 != nil {
			d.Phase2 = *o.Phase2
		}
		d.DurabilityRegions = o.DurabilityRegions
	} else if err != nil {
		return nil, err
	}
	if o.Regions != nil && *o.Regions != len(d.Regions) {
		return nil, fmt.Errorf("regions: the sandbox in %s has %d, which cannot be changed: use another --dir, or remove that directory", dir, len(d.Regions))
	}
	if fixed := o.fixedDiffers(d); len(fixed) > 0 {
		return nil, fmt.Errorf("%s: fixed when the sandbox in %s was made: use another --dir, or remove that directory", strings.Join(fixed, ", "), dir)
	}
	if o.WAN != nil {
		d.WAN = *o.WAN
	}
	if o.Settings != nil {
		d.Settings = o.Settings
	}
	if o.Jaeger != nil {
		d.Jaeger = *o.Jaeger
	}
	if o.OTLP != nil {
		d.OTLP = *o.OTLP
	}
	if o.Feed != nil {
		d.Feed = *o.Feed
	}
	return d, checkWAN(d.WAN)
}

// fixedDiffers tells which of the options given, of those that a sandbox keeps
// for its life, are not its own.
func (o Options) fixedDiffers(d *Description) (out []string) {
	for kind, names := range map[string][]string{KindWitness: o.Witnesses, KindLearner: o.Learners} {
		for _, name := range names {
			if r, err := d.Region(name); err != nil || r.Kind != kind {
				out = append(out, "--"+kind+" "+name)
			}
		}
	}
	if o.Phase1 != nil && *o.Phase1 != d.Phase1 {
		out = append(out, "--phase1")
	}
	if o.Phase2 != nil && *o.Phase2 != d.Phase2 {
		out = append(out, "--phase2")
	}
	if o.DurabilityRegions != nil && (d.DurabilityRegions == nil || *o.DurabilityRegions != *d.DurabilityRegions) {
		out = append(out, "--durability-regions")
	}
	slices.Sort(out)
	return out
}

// differs tells which of the options given are not those of a running sandbox.
func (o Options) differs(d *Description) []string {
	var out []string
	if o.Regions != nil && *o.Regions != len(d.Regions) {
		out = append(out, "--regions")
	}
	if o.WAN != nil && *o.WAN != d.WAN {
		out = append(out, "--wan")
	}
	if o.OTLP != nil && *o.OTLP != d.OTLP {
		out = append(out, "--otlp")
	}
	if o.Jaeger != nil && *o.Jaeger != d.Jaeger {
		out = append(out, "--jaeger")
	}
	if o.Feed != nil && *o.Feed != d.Feed {
		out = append(out, "--feed")
	}
	out = append(out, o.fixedDiffers(d)...)
	return out
}

// CheckRunning compares the options with those of the sandbox that runs in
// o.Dir: an error names what a running sandbox cannot take up.
func (o Options) CheckRunning() error {
	d, err := Load(o.Dir)
	if err != nil {
		return err
	}
	if diff := o.differs(d); len(diff) > 0 {
		return fmt.Errorf("%w with other settings of %s: `paxosctl dev down` first", ErrRunning, strings.Join(diff, ", "))
	}
	return nil
}

func quorateCommand(bin string) ([]string, error) {
	if bin == "" {
		bin = os.Getenv("QUORATE_BIN")
	}
	if bin == "" {
		self, err := os.Executable()
		if err != nil {
			return nil, err
		}
		bin = filepath.Join(filepath.Dir(self), "quorate")
	}
	bin, err := filepath.Abs(bin)
	if err != nil {
		return nil, err
	}
	if _, err := exec.LookPath(bin); err != nil {
		return nil, fmt.Errorf("the daemon is not there: %w (build it with `make build`, or name it by --quorate or QUORATE_BIN)", err)
	}
	return []string{bin}, nil
}

func takeLock(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, "sandbox.lock"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, fmt.Errorf("%w in %s", ErrRunning, dir)
		}
		return nil, fmt.Errorf("lock %s: %w", dir, err)
	}
	return f, nil
}

// Start starts everything that does not run, all regions at once, and returns
// when each process answers.
func (s *Supervisor) Start(ctx context.Context) error {
	err := s.start(ctx)
	s.startOnce.Do(func() {
		s.startErr = err
		close(s.started)
	})
	return err
}

func (s *Supervisor) start(ctx context.Context) error {
	ctx, cancel := s.whileUp(ctx)
	defer cancel()
	if s.description.Jaeger {
		s.progress("starting Jaeger")
		if err := s.startJaeger(ctx); err != nil {
			return fmt.Errorf("start Jaeger: %w", err)
		}
	}
	s.progress(fmt.Sprintf("starting %d regions", len(s.regions)))
	errs := make([]error, len(s.regions))
	var starting sync.WaitGroup
	for i, r := range s.regions {
		starting.Go(func() { errs[i] = r.start(ctx) })
	}
	starting.Wait()
	return errors.Join(errs...)
}

// AwaitReady returns when a leader takes writes and every region has applied
// all that was chosen when it began to. It waits for the first Start to be over.
func (s *Supervisor) AwaitReady(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	ctx, cancel = s.whileUp(ctx)
	defer cancel()
	select {
	case <-s.started:
		if s.startErr != nil {
			return s.startErr
		}
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	var target uint64 // 0 until there is a leader; its log begins with its opening
	said, saidAt := "", time.Now()
	for {
		var waiting []string
		healths := make([]Health, len(s.regions))
		errs := make([]error, len(s.regions))
		var asking sync.WaitGroup
		for i, r := range s.regions {
			if p := r.process(); !p.running() {
				return fmt.Errorf("the sidecar of %s does not run\n%s", r.Name, logTail(r.sidecarLog()))
			}
			asking.Go(func() { healths[i], errs[i] = r.health(ctx) })
		}
		asking.Wait()
		leader := slices.IndexFunc(healths, func(h Health) bool { return h.Writable })
		if leader >= 0 && target == 0 {
			target = healths[leader].Chosen
		}
		var late []*region
		for i, r := range s.regions {
			switch h := healths[i]; {
			case errs[i] != nil:
				waiting = append(waiting, fmt.Sprintf("%s: %v", r.Name, errs[i]))
			case !h.Healthy:
				waiting = append(waiting, fmt.Sprintf("%s: %s, %s", r.Name, h.State, h.Health))
			case leader < 0:
				continue
			case h.Leader != s.regions[leader].Name || h.Applied < target && (r.HasDatabase() || h.Chosen < target):
				waiting = append(waiting, fmt.Sprintf("%s: %s, applied %d of %d", r.Name, h.State, h.Applied, target))
			default:
				continue
			}
			late = append(late, r)
		}
		if leader < 0 {
			waiting = append(waiting, "a region that takes writes")
			if len(late) == 0 {
				late = s.regions[:1]
			}
		}
		if len(waiting) == 0 {
			return nil
		}
		line := "waiting for " + strings.Join(waiting, "; ")
		if line != said && time.Since(saidAt) >= waitingSaidEvery {
			s.progress(line)
			said, saidAt = line, time.Now()
		}
		select {
		case <-ctx.Done():
			var tails strings.Builder
			for _, r := range late {
				tails.WriteString("\n" + logTail(r.sidecarLog()))
			}
			return fmt.Errorf("not ready: %s: %w%s", strings.Join(waiting, "; "), ctx.Err(), tails.String())
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// Down ends every process and lets go of the directory. Data stays. Its bounds
// are its own: it takes no context, since nothing may be left behind.
func (s *Supervisor) Down() error {
	s.downOnce.Do(func() {
		s.endLife()
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
		defer cancel()
		errs := make([]error, len(s.regions))
		var stopping sync.WaitGroup
		for i, r := range s.regions {
			stopping.Go(func() { errs[i] = r.stop(ctx) })
		}
		stopping.Wait()
		s.stopJaeger() // last: the sidecars send it what they have left
		s.downErr = errors.Join(errs...)
		s.release()
		close(s.down)
	})
	return s.downErr
}

// whileUp returns a context that ends with ctx or when the sandbox goes down.
func (s *Supervisor) whileUp(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(s.life, func() { cancel(errors.New("the sandbox is taken down")) })
	return ctx, func() { stop(); cancel(nil) }
}

// Done is closed when the sandbox is down, whoever asked for it.
func (s *Supervisor) Done() <-chan struct{} { return s.down }

// release lets go of what is no process.
func (s *Supervisor) release() {
	s.endLife()
	if s.network != nil {
		s.network.close()
	}
	if s.spawner != nil {
		s.spawner.close()
	}
	if s.control != nil {
		s.control.close()
	}
	s.lock.Close()
}

func (s *Supervisor) region(name string) (*region, error) {
	for _, r := range s.regions {
		if r.Name == name {
			return r, nil
		}
	}
	_, err := s.description.Region(name)
	return nil, err
}

// StartRegion starts whatever of a region does not run and returns when it
// answers; it does not wait until the region has caught up.
func (s *Supervisor) StartRegion(ctx context.Context, name string) error {
	r, err := s.region(name)
	if err != nil {
		return err
	}
	ctx, cancel := s.whileUp(ctx)
	defer cancel()
	return r.start(ctx)
}

// Kill ends a region's processes with SIGKILL and returns when they are gone.
func (s *Supervisor) Kill(ctx context.Context, name string, part Part) error {
	r, err := s.region(name)
	if err != nil {
		return err
	}
	return r.kill(ctx, part)
}

// Pause stops the sidecar (Both is taken as Sidecar) or the server of a region
// and returns when it stands still.
func (s *Supervisor) Pause(ctx context.Context, name string, part Part) error {
	r, err := s.region(name)
	if err != nil {
		return err
	}
	return r.pause(ctx, part)
}

// Resume undoes Pause.
func (s *Supervisor) Resume(_ context.Context, name string, part Part) error {
	r, err := s.region(name)
	if err != nil {
		return err
	}
	return r.resume(part)
}

// Partition cuts the regions off from all others, in both directions, and
// returns when nothing passes any more. Regions named in one call still reach
// each other. Later calls add.
func (s *Supervisor) Partition(_ context.Context, names ...string) error {
	return s.network.partition(names)
}

// Heal takes the regions, all if none is named, out of every partition.
func (s *Supervisor) Heal(_ context.Context, names ...string) error { return s.network.heal(names) }

// Wipe kills a region and destroys its data.
func (s *Supervisor) Wipe(ctx context.Context, name string) error {
	r, err := s.region(name)
	if err != nil {
		return err
	}
	return r.wipe(ctx)
}
