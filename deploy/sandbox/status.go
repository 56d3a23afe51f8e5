package sandbox

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"sync"
)

// Status is a sandbox as it is.
type Status struct {
	Dir           string         `json:"dir"`
	SupervisorPID int            `json:"supervisor_pid"`
	WAN           string         `json:"wan"`
	Leader        string         `json:"leader"` // empty: no region takes writes
	OTLP          string         `json:"otlp,omitempty"`
	JaegerURL     string         `json:"jaeger_url,omitempty"`
	JaegerPID     int            `json:"jaeger_pid,omitempty"`
	Regions       []RegionStatus `json:"regions"`
	Links         []LinkStatus   `json:"links"`
}

// RegionStatus is a region as it is.
type RegionStatus struct {
	Region      string            `json:"region"`
	Place       string            `json:"place,omitempty"` // where the delays put it
	Kind        string            `json:"kind"`            // voter, witness or learner
	State       string            `json:"state"`           // what the sidecar says, or what keeps it from speaking
	Role        string            `json:"role,omitempty"`
	Writable    bool              `json:"writable"`
	Healthy     bool              `json:"healthy"`
	Health      string            `json:"health,omitempty"` // what is wrong, as the sidecar says
	Chosen      uint64            `json:"chosen"`
	Applied     uint64            `json:"applied"`
	Partitioned bool              `json:"partitioned"`
	DSN         string            `json:"dsn"`
	SidecarPID  int               `json:"sidecar_pid"`  // 0: does not run
	PostgresPID int               `json:"postgres_pid"` // 0: does not run
	Addresses   map[string]string `json:"addresses"`    // it listens at, by purpose
	NATSURL     string            `json:"nats_url"`     // empty without the feed
	LogDir      string            `json:"log_dir"`
	ConfigFile  string            `json:"config_file"`
	DataDirs    map[string]string `json:"data_dirs"` // of the sidecar and of postgres
}

// LinkStatus is one relay: how From reaches To for a purpose.
type LinkStatus struct {
	From            string  `json:"from"`
	To              string  `json:"to"`
	Purpose         string  `json:"purpose"`
	Address         string  `json:"address"`
	RoundTripMillis float64 `json:"round_trip_ms"`
	Cut             bool    `json:"cut"`
}

// Status asks every region how it is.
func (s *Supervisor) Status(ctx context.Context) Status {
	d := s.description
	st := Status{Dir: s.dir, SupervisorPID: os.Getpid(), WAN: d.WAN, OTLP: s.otlp(), Regions: make([]RegionStatus, len(s.regions))}
	if d.Jaeger {
		st.JaegerURL = "http://" + address(d.JaegerPorts["query"])
		if s.jaeger.running() {
			st.JaegerPID = s.jaeger.pid
		}
	}
	var asking sync.WaitGroup
	for i, r := range s.regions {
		asking.Go(func() {
			st.Regions[i] = r.status(ctx, d)
			st.Regions[i].Place = Place(d.WAN, i)
			st.Regions[i].Partitioned = s.network.partitioned(r.Name)
		})
	}
	asking.Wait()
	for _, r := range st.Regions {
		if r.Writable {
			st.Leader = r.Region
		}
	}
	for _, p := range purposes {
		for _, from := range d.Regions {
			for _, to := range d.Regions {
				if from == to {
					continue
				}
				w := s.network.wire(from.Name, to.Name)
				st.Links = append(st.Links, LinkStatus{
					From: from.Name, To: to.Name, Purpose: p.name,
					Address:         address(d.Relays[p.name][from.Name+">"+to.Name]),
					RoundTripMillis: w.RoundTrip().Seconds() * 1000,
					Cut:             w.IsCut(),
				})
			}
		}
	}
	return st
}

func (r *region) status(ctx context.Context, d *Description) RegionStatus {
	st := RegionStatus{
		Region: r.Name, Kind: cmp.Or(r.Kind, "voter"), DSN: r.DSN(), LogDir: r.logDir(), ConfigFile: r.configFile(),
		Addresses: map[string]string{},
		DataDirs:  map[string]string{"sidecar": r.sidecarData(), "postgres": r.server.DataDir()},
	}
	for purpose := range r.Ports {
		st.Addresses[purpose] = r.Address(purpose)
	}
	if d.Feed {
		st.NATSURL = "nats://" + r.Address("nats")
	} else {
		delete(st.Addresses, "nats")
		delete(st.Addresses, "nats_cluster")
	}
	if r.HasDatabase() {
		st.PostgresPID, _ = r.server.Running()
	} else {
		st.DSN = ""
	}
	p := r.process()
	if p.running() {
		st.SidecarPID = p.pid
	}
	switch {
	case st.SidecarPID == 0 && st.PostgresPID == 0:
		data := r.server.DataDir()
		if !r.HasDatabase() {
			data = r.sidecarData()
		}
		if _, err := os.Stat(data); err != nil {
			st.State = "wiped"
		} else {
			st.State = "stopped"
		}
	case st.SidecarPID == 0:
		st.State = "sidecar stopped"
		if p != nil && p.err != nil {
			st.State = fmt.Sprintf("sidecar ended: %v", p.err)
		}
	case p.paused():
		st.State = "sidecar paused"
	default:
		h, err := r.health(ctx)
		if err != nil {
			st.State = "sidecar does not answer"
			break
		}
		st.State, st.Role, st.Writable, st.Healthy, st.Health, st.Chosen, st.Applied = h.State, h.Role, h.Writable, h.Healthy, h.Health, h.Chosen, h.Applied
	}
	switch {
	case st.SidecarPID != 0 && st.PostgresPID == 0 && r.HasDatabase():
		st.State += ", postgres stopped"
	case r.server.Paused():
		st.State += ", postgres paused"
	}
	return st
}
