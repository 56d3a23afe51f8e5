package main

import (
	"context"
	"fmt"
	"io"
	"strconv"

	"github.com/spf13/cobra"

	"quorate/sidecar/admin"
	"quorate/sidecar/admin/adminpb"
)

// clusterView is how the cluster is. Its JSON field names are stable.
type clusterView struct {
	Cluster           string       `json:"cluster"`
	Leader            string       `json:"leader"`             // empty: none
	DurabilityRegions uint32       `json:"durability_regions"` // whose loss for good loses nothing acknowledged
	Phase1Quorum      uint32       `json:"phase1_quorum"`
	Phase2Quorum      uint32       `json:"phase2_quorum"` // regions that have an acknowledged commit on disk, at least
	Voters            uint32       `json:"voters"`
	Regions           []regionView `json:"regions"`
}

type regionView struct {
	Name        string  `json:"name"`
	Reachable   bool    `json:"reachable"`
	ReplicaID   uint32  `json:"replica_id"`
	Role        string  `json:"role"`
	State       string  `json:"state"`
	Leader      string  `json:"leader"`
	Writable    bool    `json:"writable"`
	Ballot      string  `json:"ballot"`
	LeaseLeftMS int64   `json:"lease_left_ms"`
	Base        uint64  `json:"base"`
	Chosen      uint64  `json:"chosen"`
	Applied     uint64  `json:"applied"`
	LagSlots    uint64  `json:"lag_slots"`
	LagSeconds  float64 `json:"lag_seconds"`
	CaughtUp    bool    `json:"caught_up"`
	Healthy     bool    `json:"healthy"`
	Health      string  `json:"health"`
	Incarnation string  `json:"incarnation"`
	Void        uint64  `json:"void"`
	Kind        string  `json:"kind"`
	Durable     uint64  `json:"durable"`
	LogBytes    uint64  `json:"log_bytes"`

	ballotCounter uint64
	ballotReplica uint32
}

func viewOf(r *adminpb.RegionStatus) regionView {
	return regionView{
		Name:        r.GetName(),
		Reachable:   r.GetReachable(),
		ReplicaID:   r.GetReplicaId(),
		Role:        r.GetRole(),
		State:       r.GetState(),
		Leader:      r.GetLeader(),
		Writable:    r.GetWritable(),
		Ballot:      fmt.Sprintf("%d.%d", r.GetBallotCounter(), r.GetBallotReplica()),
		LeaseLeftMS: r.GetLeaseLeftMs(),
		Base:        r.GetBase(),
		Chosen:      r.GetChosen(),
		Applied:     r.GetApplied(),
		LagSlots:    r.GetLagSlots(),
		LagSeconds:  r.GetLagSeconds(),
		CaughtUp:    r.GetCaughtUp(),
		Healthy:     r.GetHealthy(),
		Health:      r.GetHealth(),
		Incarnation: fmt.Sprintf("%016x", r.GetIncarnation()),
		Void:        r.GetVoidEntries(),
		Kind:        r.GetKind(),
		Durable:     r.GetDurable(),
		LogBytes:    r.GetLogBytes(),

		ballotCounter: r.GetBallotCounter(),
		ballotReplica: r.GetBallotReplica(),
	}
}

// below reports whether r's ballot is ordered before s's.
func (r regionView) below(s regionView) bool {
	return r.ballotCounter < s.ballotCounter || r.ballotCounter == s.ballotCounter && r.ballotReplica < s.ballotReplica
}

// leads reports whether r says itself that it leads.
func (r regionView) leads() bool { return r.Reachable && r.Role == admin.RoleLeader }

// settle derives what no single region knows: the leader, of those that believe
// to lead the one with the highest ballot, and the lag of those that
// answer behind the highest slot that any region knows to be chosen.
func (v *clusterView) settle() {
	var leader *regionView
	var chosen uint64
	for i := range v.Regions {
		r := &v.Regions[i]
		chosen = max(chosen, r.Chosen)
		if r.leads() && (leader == nil || leader.below(*r)) {
			leader = r
		}
	}
	v.Leader = ""
	if leader != nil {
		v.Leader = leader.Name
	}
	for i := range v.Regions {
		if r := &v.Regions[i]; r.Reachable && r.Role != admin.RoleWitness && chosen > r.Applied {
			r.LagSlots = max(r.LagSlots, chosen-r.Applied)
		}
	}
}

// own returns what the region that answers says of itself.
func own(s *adminpb.StatusResponse) *adminpb.RegionStatus {
	for _, r := range s.GetRegions() {
		if r.GetName() == s.GetRegion() {
			return r
		}
	}
	return &adminpb.RegionStatus{Name: s.GetRegion()}
}

type statusAnswer = answered[*adminpb.StatusResponse]

// view asks how the cluster is. One endpoint is asked for all regions; of
// several each is asked for itself, so that what a region cut off from the
// others believes of them counts for nothing.
func (a *addressing) view(cmd *cobra.Command, enough func([]statusAnswer) bool) (clusterView, error) {
	endpoints, err := a.endpoints(cmd)
	if err != nil {
		return clusterView{}, err
	}
	alone := len(endpoints) == 1
	answers := ask(cmd.Context(), endpoints, enough, func(ctx context.Context, c adminpb.AdminClient) (*adminpb.StatusResponse, error) {
		return c.Status(ctx, &adminpb.StatusRequest{All: alone})
	})
	if !first(answers) {
		return clusterView{}, unreachable(answers)
	}
	var v clusterView
	for _, answer := range answers {
		if answer.err != nil {
			v.Regions = append(v.Regions, regionView{Name: answer.endpoint.Name, Health: "its sidecar does not answer"})
			continue
		}
		s := answer.value
		v.Cluster = s.GetCluster()
		if s.GetVoters() > 0 && (v.Voters == 0 || s.GetDurabilityRegions() < v.DurabilityRegions) {
			// Of regions that disagree, as they may while that changes, the one that
			// promises least.
			v.DurabilityRegions, v.Phase1Quorum, v.Phase2Quorum, v.Voters = s.GetDurabilityRegions(), s.GetPhase1Quorum(), s.GetPhase2Quorum(), s.GetVoters()
		}
		if alone {
			for _, r := range s.GetRegions() {
				v.Regions = append(v.Regions, viewOf(r))
			}
			continue
		}
		r := viewOf(own(s))
		r.Reachable = true
		v.Regions = append(v.Regions, r)
	}
	v.settle()
	return v, nil
}

func statusCommand(a *addressing) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show how every region is",
		Long: `Show how every region is: its role, what its database is doing, the ballot and
the rest of the lease, how far it has chosen and applied, and what is wrong.

It is no error that a region is down or that none leads; see leader for that.

` + addressingHelp + "\n\n" + exitCodesHelp,
		Example: `  paxosctl status
  paxosctl status --addr 10.1.0.5:7461
  paxosctl status -o json | jq '.regions[] | select(.healthy | not)'`,
		Args: usage(cobra.NoArgs),
	}
	a.addFlags(cmd)
	output := addOutputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		v, err := a.view(cmd, all)
		if err != nil {
			return err
		}
		if *output == formatJSON {
			return printJSON(cmd.OutOrStdout(), v)
		}
		return printStatus(cmd.OutOrStdout(), v)
	}
	return cmd
}

func printStatus(w io.Writer, v clusterView) error {
	leader := "no leader"
	if v.Leader != "" {
		leader = "leader " + v.Leader
	}
	if _, err := fmt.Fprintf(w, "cluster %s: %s, an acknowledged commit is on disk in %d regions\n", v.Cluster, leader, v.Phase2Quorum); err != nil {
		return err
	}
	if minority := (v.Voters - 1) / 2; v.Voters > 0 && v.DurabilityRegions < minority {
		fmt.Fprintf(w, "REDUCED DURABILITY: the loss of %d of %d voting regions loses acknowledged commits; %d may be lost (durability_regions), majorities would allow %d\n",
			v.DurabilityRegions+1, v.Voters, v.DurabilityRegions, minority)
	}
	if v.Voters > 0 && (v.Phase1Quorum != v.Voters/2+1 || v.Phase2Quorum != v.Voters/2+1) {
		fmt.Fprintf(w, "quorums: phase 1 (electing a leader) %d, phase 2 (committing) %d of %d voting regions\n", v.Phase1Quorum, v.Phase2Quorum, v.Voters)
	}
	fmt.Fprintln(w)
	rows := [][]string{{"REGION", "REPLICA", "ROLE", "STATE", "WRITES", "BALLOT", "LEASE", "CHOSEN", "APPLIED", "LAG", "HEALTH"}}
	for _, r := range v.Regions {
		if !r.Reachable {
			rows = append(rows, []string{r.Name, "-", "-", "-", "-", "-", "-", "-", "-", "-", "unreachable: " + r.Health})
			continue
		}
		writes, lease := "no", "-"
		if r.Writable {
			writes = "yes"
		}
		if r.leads() {
			lease = strconv.FormatInt(r.LeaseLeftMS, 10) + " ms"
		}
		rows = append(rows, []string{
			r.Name,
			strconv.FormatUint(uint64(r.ReplicaID), 10),
			r.Role,
			r.State,
			writes,
			r.Ballot,
			lease,
			strconv.FormatUint(r.Chosen, 10),
			strconv.FormatUint(r.Applied, 10),
			fmt.Sprintf("%d slots, %.1f s", r.LagSlots, r.LagSeconds),
			r.Health,
		})
	}
	if err := printTable(w, rows); err != nil {
		return err
	}
	for _, r := range v.Regions {
		if r.Void > 0 {
			fmt.Fprintf(w, "%s: %d void entries since its sidecar started (of leaderships that ended: no region applied them, nobody was told that they committed)\n", r.Name, r.Void)
		}
	}
	return nil
}
