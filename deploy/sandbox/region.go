package sandbox

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
	"go.yaml.in/yaml/v3"

	"quorate/deploy/sandbox/postgres"
)

// Part says which processes of a region an operation is about.
type Part string

// The parts of a region.
const (
	Both     Part = ""
	Sidecar  Part = "sidecar"
	Postgres Part = "postgres"
)

const (
	answerTimeout = 60 * time.Second // for a started process to answer
	stopTimeout   = 10 * time.Second // for a process asked to end
)

// region is one region's processes and files.
type region struct {
	*RegionDescription
	dir     string // its part of the sandbox's directory
	command []string
	spawner *spawner
	server  *postgres.Server

	operating sync.Mutex // one start, stop, kill, wipe, pause or resume at a time

	mu      sync.Mutex // taken after operating, if both
	sidecar *process   // nil until started
}

func (r *region) logDir() string      { return filepath.Join(r.dir, "log") }
func (r *region) sidecarLog() string  { return filepath.Join(r.logDir(), "quorate.log") }
func (r *region) sidecarData() string { return filepath.Join(r.dir, "quorate") }
func (r *region) configFile() string  { return filepath.Join(r.dir, "region.yaml") }
func (r *region) pidFile() string     { return filepath.Join(r.dir, "sidecar.pid") }

// createdFile says that the replicated database was created: only once in a
// server's life, since the sidecar may at times have it under another name.
func (r *region) createdFile() string { return filepath.Join(r.dir, "database-created") }

func (r *region) process() *process {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.sidecar
}

// clean ends what an earlier supervisor, killed itself, left running.
func (r *region) clean(ctx context.Context) error {
	return errors.Join(endRecorded(ctx, r.pidFile()), r.server.Kill(ctx))
}

// writeConfig writes the sidecar's configuration: other regions at the
// addresses of the relays that lead there.
func (r *region) writeConfig(d *Description, binDir, otlp string) error {
	listen := map[string]string{"admin": r.Address("admin"), "nats": r.Address("nats")}
	for _, p := range purposes {
		listen[p.name] = r.Address(p.name)
	}
	var regions []map[string]any
	for _, other := range d.Regions {
		entry := map[string]any{"name": other.Name}
		if other.Kind != "" {
			entry["kind"] = other.Kind
		}
		for _, p := range purposes {
			if other.Name == r.Name {
				entry[p.regionKey] = r.Address(p.name)
			} else {
				entry[p.regionKey] = address(d.Relays[p.name][r.Name+">"+other.Name])
			}
		}
		regions = append(regions, entry)
	}
	consensus := map[string]any{}
	if d.Phase1 != 0 {
		consensus["phase1_quorum"] = d.Phase1
	}
	if d.Phase2 != 0 {
		consensus["phase2_quorum"] = d.Phase2
	}
	settings := map[string]any{
		"cluster":          d.Cluster,
		"region":           r.Name,
		"data_dir":         r.sidecarData(),
		"postgres":         map[string]any{"dsn": r.DSN(), "bin_dir": binDir},
		"listen":           listen,
		"regions":          regions,
		"preferred_leader": d.Regions[0].Name,
		"tracing":          map[string]any{"otlp": otlp},
		"feed":             map[string]any{"enabled": d.Feed},
		"consensus":        consensus,
	}
	if d.DurabilityRegions != nil {
		settings["durability_regions"] = *d.DurabilityRegions
	}
	if !r.HasDatabase() {
		delete(settings, "postgres")
	}
	for _, key := range slices.Sorted(maps.Keys(d.Settings)) {
		of, name, one := strings.Cut(key, ":")
		if !one {
			name = key
		} else if of != r.Name {
			continue
		}
		section, setting, nested := strings.Cut(name, ".")
		if !nested {
			settings[name] = d.Settings[key]
			continue
		}
		in, _ := settings[section].(map[string]any)
		if in == nil {
			in = map[string]any{}
			settings[section] = in
		}
		in[setting] = d.Settings[key]
	}
	b, err := yaml.Marshal(settings)
	if err != nil {
		return err
	}
	const head = "# Written by paxosctl dev at every start of the sandbox.\n# Other regions' addresses are those of relays.\n"
	return os.WriteFile(r.configFile(), append([]byte(head), b...), 0o644)
}

// start starts whatever of the region does not run, and returns when it
// answers.
func (r *region) start(ctx context.Context) error {
	r.operating.Lock()
	defer r.operating.Unlock()
	if err := context.Cause(ctx); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	if err := r.startPostgres(ctx); err != nil {
		return fmt.Errorf("start PostgreSQL of %s: %w", r.Name, err)
	}
	if err := r.startSidecar(ctx); err != nil {
		return fmt.Errorf("start the sidecar of %s: %w", r.Name, err)
	}
	return nil
}

func (r *region) startPostgres(ctx context.Context) error {
	if !r.HasDatabase() {
		return nil
	}
	if _, ok := r.server.Running(); ok {
		return nil
	}
	if err := r.server.Kill(ctx); err != nil { // backends that outlived their postmaster
		return err
	}
	if err := r.server.Init(ctx); err != nil {
		return err
	}
	if _, err := r.server.Start(ctx); err != nil {
		return err
	}
	if _, err := os.Stat(r.createdFile()); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := r.createDatabase(ctx); err != nil {
		return fmt.Errorf("create database %s: %w", database, err)
	}
	return os.WriteFile(r.createdFile(), nil, 0o644)
}

func (r *region) createDatabase(ctx context.Context) error {
	conn, err := pgx.Connect(ctx, r.server.DSN("postgres")+"?synchronous_commit=local")
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	var exists bool
	if err := conn.QueryRow(ctx, "SELECT EXISTS (SELECT FROM pg_database WHERE datname = $1)", database).Scan(&exists); err != nil || exists {
		return err
	}
	_, err = conn.Exec(ctx, "CREATE DATABASE "+pgx.Identifier{database}.Sanitize())
	return err
}

func (r *region) startSidecar(ctx context.Context) error {
	p := r.process()
	if !p.running() {
		cmd := exec.Command(r.command[0], append(r.command[1:], "run", "--config", r.configFile())...)
		cmd.Dir = r.dir
		var err error
		if p, err = launch(r.spawner, cmd, r.sidecarLog(), r.pidFile()); err != nil {
			return err
		}
		r.mu.Lock()
		r.sidecar = p
		r.mu.Unlock()
	}
	if p.paused() {
		return nil // paused on purpose: it runs, and cannot answer
	}
	for {
		if _, err := r.health(ctx); err == nil {
			return nil
		} else if ctx.Err() != nil {
			return fmt.Errorf("it does not answer on %s: %w\n%s", r.Address("admin"), err, logTail(r.sidecarLog()))
		}
		select {
		case <-p.done:
			return fmt.Errorf("it ended: %v\n%s", p.err, logTail(r.sidecarLog()))
		case <-ctx.Done():
		case <-time.After(25 * time.Millisecond):
		}
	}
}

// Health is what a sidecar says of itself at /status of its admin address.
type Health struct {
	Region   string `json:"region"`
	Role     string `json:"role"`
	Leader   string `json:"leader"`
	Writable bool   `json:"writable"`
	Chosen   uint64 `json:"chosen"`
	Applied  uint64 `json:"applied"`
	Healthy  bool   `json:"healthy"`
	Health   string `json:"health"` // what is wrong, and how to mend it
	State    string `json:"state"`
}

// health asks the sidecar. One that is up but not healthy answers too, with any
// HTTP status.
func (r *region) health(ctx context.Context) (Health, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	var h Health
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+r.Address("admin")+"/status", nil)
	if err != nil {
		return h, err
	}
	res, err := adminClient.Do(req)
	if err != nil {
		return h, err
	}
	defer res.Body.Close()
	if err := json.NewDecoder(res.Body).Decode(&h); err != nil {
		return h, fmt.Errorf("the answer of %s, %s, is no status: %w", req.URL, res.Status, err)
	}
	if h.Region != r.Name {
		return h, fmt.Errorf("%s is answered by region %q", req.URL, h.Region)
	}
	return h, nil
}

// adminClient keeps no connection: a sidecar may be killed between two questions.
var adminClient = &http.Client{Transport: &http.Transport{DisableKeepAlives: true, Proxy: nil}}

// stop ends the region's processes in good order, within bounds.
func (r *region) stop(ctx context.Context) error {
	r.operating.Lock()
	defer r.operating.Unlock()
	patient, cancel := context.WithTimeout(ctx, stopTimeout)
	defer cancel()
	r.process().stop(patient)
	if err := errors.Join(r.stopPostgres(ctx), forget(r.pidFile())); err != nil {
		return fmt.Errorf("stop %s: %w", r.Name, err)
	}
	return nil
}

// stopPostgres tries SIGINT (fast), then SIGQUIT (immediate), then SIGKILL.
func (r *region) stopPostgres(ctx context.Context) error {
	if r.server.Paused() {
		if err := r.server.Resume(); err != nil {
			return err
		}
	}
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGQUIT} {
		patient, cancel := context.WithTimeout(ctx, stopTimeout)
		err := r.server.Stop(patient, sig)
		cancel()
		if err == nil {
			break
		}
	}
	return r.server.Kill(ctx) // of what did not heed, or had no pid file yet
}

// kill ends processes as a crash would, and returns when they are gone.
func (r *region) kill(ctx context.Context, part Part) error {
	r.operating.Lock()
	defer r.operating.Unlock()
	return r.killHeld(ctx, part)
}

func (r *region) killHeld(ctx context.Context, part Part) error {
	ctx, cancel := context.WithTimeout(ctx, stopTimeout)
	defer cancel()
	p := r.process()
	if part != Postgres && p.running() {
		// Sent now, waited for below: both parts die together.
		_ = syscall.Kill(p.pid, syscall.SIGKILL)
	}
	if part != Sidecar {
		if err := r.server.Kill(ctx); err != nil {
			return fmt.Errorf("kill PostgreSQL of %s: %w", r.Name, err)
		}
	}
	if part != Postgres {
		p.kill()
		return forget(r.pidFile())
	}
	return nil
}

// pause stops the sidecar, or the server, and returns when it stands still.
func (r *region) pause(ctx context.Context, part Part) error {
	r.operating.Lock()
	defer r.operating.Unlock()
	ctx, cancel := context.WithTimeout(ctx, stopTimeout)
	defer cancel()
	if part == Postgres {
		if err := r.server.Pause(ctx); err != nil {
			return fmt.Errorf("pause PostgreSQL of %s: %w", r.Name, err)
		}
		return nil
	}
	if err := r.process().pause(ctx); err != nil {
		return fmt.Errorf("pause the sidecar of %s: %w", r.Name, err)
	}
	return nil
}

func (r *region) resume(part Part) error {
	r.operating.Lock()
	defer r.operating.Unlock()
	if part == Postgres {
		if err := r.server.Resume(); err != nil {
			return fmt.Errorf("resume PostgreSQL of %s: %w", r.Name, err)
		}
		return nil
	}
	if err := r.process().resume(); err != nil {
		return fmt.Errorf("resume the sidecar of %s: %w", r.Name, err)
	}
	return nil
}

// wipe kills the region and destroys its data. Its configuration, ports and
// logs stay.
func (r *region) wipe(ctx context.Context) error {
	r.operating.Lock()
	defer r.operating.Unlock()
	if err := r.killHeld(ctx, Both); err != nil {
		return err
	}
	// The mark goes first: a wipe broken off makes the database be looked for.
	for _, path := range []string{r.createdFile(), r.sidecarData(), r.server.DataDir()} {
		if err := os.RemoveAll(path); err != nil {
			return fmt.Errorf("wipe %s: %w", r.Name, err)
		}
	}
	return nil
}

func forget(file string) error {
	if err := os.Remove(file); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
