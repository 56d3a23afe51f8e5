package sandbox

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

const (
	descriptionVersion = 1
	descriptionFile    = "sandbox.json"
)

// A purpose is one port of a sidecar that other regions reach. Each gets a
// relay for every ordered pair of regions: to let regions speak of something
// more, add a line here.
var purposes = []struct {
	name      string // also the port's, and its key under listen: in the sidecar's configuration
	regionKey string // the key of its address in an entry of regions:
}{
	{name: "peer", regionKey: "peer"},
	{name: "nats_cluster", regionKey: "nats_route"},
}

// localPorts are a region's ports that no other region reaches.
var localPorts = []string{"postgres", "admin", "nats"}

// jaegerPorts are those of the trace viewer.
var jaegerPorts = []string{"otlp", "query", "query_grpc", "otlp_http", "admin", "collector_http", "collector_grpc"}

// The kinds of regions beside voters, as in a sidecar's configuration.
const (
	KindWitness = "witness"
	KindLearner = "learner"
)

// Description is what sandbox.json records.
type Description struct {
	Version int    `json:"version"`
	Cluster string `json:"cluster"`
	WAN     string `json:"wan"`
	OTLP    string `json:"otlp,omitempty"` // the collector given by hand
	Jaeger  bool   `json:"jaeger"`
	Feed    bool   `json:"feed"`
	// The sizes of the quorums and the losses that they stand, as in the sidecars'
	// configuration; 0 and nil: not set there.
	Phase1            int  `json:"phase1_quorum,omitempty"`
	Phase2            int  `json:"phase2_quorum,omitempty"`
	DurabilityRegions *int `json:"durability_regions,omitempty"`
	// Settings are laid over each sidecar's configuration, by their dotted keys.
	Settings     map[string]string    `json:"settings,omitempty"`
	PostgresRoot string               `json:"postgres_root"` // holds the servers' directories; usually the sandbox's own
	Regions      []*RegionDescription `json:"regions"`
	// Relays are ports by purpose and then by "FROM>TO".
	Relays      map[string]map[string]int `json:"relays"`
	JaegerPorts map[string]int            `json:"jaeger_ports,omitempty"`
}

// RegionDescription is what is fixed of one region.
type RegionDescription struct {
	Name  string         `json:"name"`
	Kind  string         `json:"kind,omitempty"` // empty: voter
	Ports map[string]int `json:"ports"`          // on 127.0.0.1, by purpose
	Admin string         `json:"admin"`          // the address of that port: where paxosctl asks
}

// Address returns the region's address for a purpose.
func (r *RegionDescription) Address(purpose string) string { return address(r.Ports[purpose]) }

// HasDatabase reports whether a PostgreSQL belongs to the region.
func (r *RegionDescription) HasDatabase() bool { return r.Kind != KindWitness }

// DSN returns a URL of a superuser to the replicated database.
func (r *RegionDescription) DSN() string {
	return fmt.Sprintf("postgres://postgres@%s/%s", r.Address("postgres"), database)
}

// database is the one that is replicated.
const database = "app"

func address(port int) string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(port)) }

// ErrNoSandbox says that a directory holds no sandbox.
var ErrNoSandbox = errors.New("no sandbox")

// Load reads the description of the sandbox in dir.
func Load(dir string) (*Description, error) {
	file := filepath.Join(dir, descriptionFile)
	b, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w in %s: start one with `paxosctl dev up --dir %s`", ErrNoSandbox, dir, dir)
	}
	if err != nil {
		return nil, err
	}
	d := &Description{}
	if err := json.Unmarshal(b, d); err != nil {
		return nil, fmt.Errorf("%s is damaged: %w (remove the sandbox's directory to begin anew)", file, err)
	}
	if d.Version != descriptionVersion {
		return nil, fmt.Errorf("%s is of version %d, this program knows %d: use another --dir, or the program that made it", file, d.Version, descriptionVersion)
	}
	return d, nil
}

func (d *Description) save(dir string) error {
	b, err := json.MarshalIndent(d, "", "  ")
	if err != nil {
		return err
	}
	file := filepath.Join(dir, descriptionFile)
	if err := os.WriteFile(file+".new", append(b, '\n'), 0o644); err != nil {
		return err
	}
	return os.Rename(file+".new", file)
}

// Region returns the region of a name.
func (d *Description) Region(name string) (*RegionDescription, error) {
	var names []string
	for _, r := range d.Regions {
		if r.Name == name {
			return r, nil
		}
		names = append(names, r.Name)
	}
	return nil, fmt.Errorf("no region %q: there are %s", name, strings.Join(names, ", "))
}

// assignPorts gives a port to everything that has none and a new one where
// another program has taken it meanwhile. It returns what it had to change.
func (d *Description) assignPorts() (changed []string, err error) {
	var ports portChooser
	assign := func(in map[string]int, key, what string) error {
		old := in[key]
		if old != 0 && ports.free(old) {
			return nil
		}
		port, err := ports.choose()
		if err != nil {
			return err
		}
		in[key] = port
		if old != 0 {
			changed = append(changed, fmt.Sprintf("%s: port %d is taken, now %d", what, old, port))
		}
		return nil
	}
	var errs []error
	for _, r := range d.Regions {
		if r.Ports == nil {
			r.Ports = map[string]int{}
		}
		for _, p := range localPorts {
			errs = append(errs, assign(r.Ports, p, r.Name+" "+p))
		}
		for _, p := range purposes {
			errs = append(errs, assign(r.Ports, p.name, r.Name+" "+p.name))
		}
		r.Admin = r.Address("admin")
	}
	if d.Relays == nil {
		d.Relays = map[string]map[string]int{}
	}
	for _, p := range purposes {
		if d.Relays[p.name] == nil {
			d.Relays[p.name] = map[string]int{}
		}
		for _, from := range d.Regions {
			for _, to := range d.Regions {
				if from != to {
					key := from.Name + ">" + to.Name
					errs = append(errs, assign(d.Relays[p.name], key, "relay "+p.name+" "+key))
				}
			}
		}
	}
	if d.Jaeger {
		if d.JaegerPorts == nil {
			d.JaegerPorts = map[string]int{}
		}
		for _, p := range jaegerPorts {
			errs = append(errs, assign(d.JaegerPorts, p, "jaeger "+p))
		}
	}
	return changed, errors.Join(errs...)
}

// portChooser finds free ports below the range from which the kernel takes the
// local ports of outgoing connections: one of those could be in use just when a
// killed region is to listen again.
type portChooser struct{ chosen map[int]bool }

func (c *portChooser) free(port int) bool {
	if c.chosen == nil {
		c.chosen = map[int]bool{}
	}
	if c.chosen[port] {
		return false
	}
	l, err := net.Listen("tcp", address(port))
	if err != nil {
		return false
	}
	l.Close()
	c.chosen[port] = true
	return true
}

func (c *portChooser) choose() (int, error) {
	const low = 10240
	high := 32768
	if b, err := os.ReadFile("/proc/sys/net/ipv4/ip_local_port_range"); err == nil {
		if f := strings.Fields(string(b)); len(f) == 2 {
			if n, err := strconv.Atoi(f[0]); err == nil && n > low+1000 {
				high = n
			}
		}
	}
	for range 1000 {
		if port := low + rand.IntN(high-low); c.free(port) {
			return port, nil
		}
	}
	return 0, fmt.Errorf("no free port between %d and %d on 127.0.0.1", low, high)
}
