package admin

import (
	"encoding/json"
	"fmt"
	"net/http"

	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// page is what GET /status tells. Its field names are stable.
type page struct {
	Cluster     string  `json:"cluster"`
	Region      string  `json:"region"`
	Role        string  `json:"role"`
	Leader      string  `json:"leader"`
	Writable    bool    `json:"writable"`
	State       string  `json:"state"`
	Healthy     bool    `json:"healthy"`
	Health      string  `json:"health"`
	CaughtUp    bool    `json:"caught_up"`
	Ballot      string  `json:"ballot"`
	ReplicaID   uint32  `json:"replica_id"`
	Incarnation string  `json:"incarnation"`
	LeaseLeftMS int64   `json:"lease_left_ms"`
	Chosen      uint64  `json:"chosen"`
	Applied     uint64  `json:"applied"`
	LagSlots    uint64  `json:"lag_slots"`
	LagSeconds  float64 `json:"lag_seconds"`
}

// newPages builds the plain HTTP face.
func newPages(cfg Config) http.Handler {
	own := func(w http.ResponseWriter, r *http.Request) (RegionStatus, ClusterStatus, bool) {
		st, err := cfg.Backend.Status(r.Context(), false)
		if err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return RegionStatus{}, ClusterStatus{}, false
		}
		return st.Own(), st, true
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /status", func(w http.ResponseWriter, r *http.Request) {
		o, st, ok := own(w, r)
		if !ok {
			return
		}
		w.Header().Set("Content-Type", "application/json")
		encoder := json.NewEncoder(w)
		encoder.SetIndent("", "  ")
		_ = encoder.Encode(page{ // an error is the reader's having left
			Cluster:     st.Cluster,
			Region:      st.Region,
			Role:        o.Role,
			Leader:      st.Leader,
			Writable:    o.Writable,
			State:       o.State,
			Healthy:     o.Healthy,
			Health:      o.Health,
			CaughtUp:    o.CaughtUp,
			Ballot:      o.Ballot.String(),
			ReplicaID:   uint32(o.ReplicaID),
			Incarnation: o.Incarnation.String(),
			LeaseLeftMS: o.LeaseLeft.Milliseconds(),
			Chosen:      uint64(o.Chosen),
			Applied:     uint64(o.Applied),
			LagSlots:    o.LagSlots,
			LagSeconds:  o.Lag.Seconds(),
		})
	})
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, r *http.Request) {
		if _, _, ok := own(w, r); ok {
			fmt.Fprintln(w, "ok")
		}
	})
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) {
		o, _, ok := own(w, r)
		if !ok {
			return
		}
		answer(w, o.Healthy && o.CaughtUp, fmt.Sprintf("%s, applied %d of %d chosen: %s", o.State, o.Applied, o.Chosen, o.Health))
	})
	mux.HandleFunc("GET /leader", func(w http.ResponseWriter, r *http.Request) {
		o, st, ok := own(w, r)
		if !ok {
			return
		}
		leader := st.Leader
		if leader == "" {
			leader = "none"
		}
		answer(w, o.Writable, leader)
	})
	mux.Handle("GET /metrics", promhttp.HandlerFor(cfg.Gatherer, promhttp.HandlerOpts{}))
	return mux
}

// answer says yes or no as probes and load balancers understand it.
func answer(w http.ResponseWriter, yes bool, text string) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	if !yes {
		w.WriteHeader(http.StatusServiceUnavailable)
	}
	fmt.Fprintln(w, text)
}
