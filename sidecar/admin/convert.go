package admin

import (
	"google.golang.org/protobuf/types/known/timestamppb"

	"quorate/sidecar/admin/adminpb"
)

func statusToProto(s ClusterStatus) *adminpb.StatusResponse {
	p := &adminpb.StatusResponse{
		Cluster:           s.Cluster,
		Region:            s.Region,
		Leader:            s.Leader,
		DurabilityRegions: uint32(s.DurabilityRegions),
		Phase1Quorum:      uint32(s.Phase1),
		Phase2Quorum:      uint32(s.Phase2),
		Voters:            uint32(s.Voters),
	}
	for _, r := range s.Regions {
		p.Regions = append(p.Regions, &adminpb.RegionStatus{
			Name:          r.Name,
			Reachable:     r.Reachable,
			ReplicaId:     uint32(r.ReplicaID),
			Role:          r.Role,
			State:         r.State,
			Leader:        r.Leader,
			Writable:      r.Writable,
			BallotCounter: r.Ballot.Counter,
			BallotReplica: uint32(r.Ballot.Replica),
			LeaseLeftMs:   r.LeaseLeft.Milliseconds(),
			Base:          uint64(r.Base),
			Chosen:        uint64(r.Chosen),
			Applied:       uint64(r.Applied),
			LagSlots:      r.LagSlots,
			LagSeconds:    r.Lag.Seconds(),
			CaughtUp:      r.CaughtUp,
			Healthy:       r.Healthy,
			Health:        r.Health,
			Incarnation:   uint64(r.Incarnation),
			VoidEntries:   r.Void,
			Kind:          r.Kind,
			Durable:       uint64(r.Durable),
			LogBytes:      r.LogBytes,
		})
	}
	return p
}

func entryToProto(e LogEntry) *adminpb.LogEntry {
	p := &adminpb.LogEntry{
		Slot:        uint64(e.Slot),
		Kind:        e.Kind,
		TermCounter: e.Term.Counter,
		TermReplica: uint32(e.Term.Replica),
		Number:      e.Number,
		Region:      e.Region,
		Incarnation: uint64(e.Incarnation),
		Verdict:     "void",
		Xid:         e.Xid,
		EndLsn:      uint64(e.EndLSN),
		Bytes:       e.Bytes,
		Trace:       e.Trace,
		Changes:     e.Changes,
		Detail:      e.Detail,
	}
	if e.Effective {
		p.Verdict = "effective"
	}
	if !e.Time.IsZero() {
		p.Time = timestamppb.New(e.Time)
	}
	for _, t := range e.Tables {
		p.Tables = append(p.Tables, &adminpb.TableRows{Table: t.Table, Rows: t.Rows})
	}
	return p
}
