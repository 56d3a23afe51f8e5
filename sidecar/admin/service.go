package admin

import (
	"context"
	"errors"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"quorate/paxosgroup"
	"quorate/sidecar/admin/adminpb"
)

const (
	// followInterval is how often a followed log is asked for more.
	followInterval = 100 * time.Millisecond
	// pausePollInterval is the grain of a measured pause.
	pausePollInterval = 2 * time.Millisecond
	// writableWait is how long after a hand-over the new leader may take to open.
	writableWait = 30 * time.Second
)

// service is the gRPC face of a Backend.
type service struct {
	adminpb.UnimplementedAdminServer
	backend Backend
}

func (s *service) Status(ctx context.Context, r *adminpb.StatusRequest) (*adminpb.StatusResponse, error) {
	st, err := s.backend.Status(ctx, r.GetAll())
	if err != nil {
		return nil, rpcError(err)
	}
	return statusToProto(st), nil
}

func (s *service) Leader(ctx context.Context, _ *adminpb.LeaderRequest) (*adminpb.LeaderResponse, error) {
	st, err := s.backend.Status(ctx, false)
	if err != nil {
		return nil, rpcError(err)
	}
	if st.Leader == "" {
		return nil, rpcError(ErrNoLeader)
	}
	return &adminpb.LeaderResponse{
		Region:   st.Leader,
		Writable: st.Leader == st.Region && st.Own().Writable,
	}, nil
}

// Transfer measures the pause from here: begun when this region is first seen to
// leave its leading, ended when the new leader's fence is seen open. To see that
// takes until all regions have answered or were given up, so the pause is told
// too long by that, and never too short by more than pausePollInterval.
func (s *service) Transfer(ctx context.Context, r *adminpb.TransferRequest) (*adminpb.TransferResponse, error) {
	before, err := s.backend.Status(ctx, false)
	if err != nil {
		return nil, rpcError(err)
	}
	response := &adminpb.TransferResponse{From: before.Leader}
	if before.Leader == r.GetTo() && r.GetTo() != "" {
		return response, nil // it leads already: nothing pauses
	}

	watchCtx, stopWatch := context.WithCancel(ctx)
	defer stopWatch()
	closedAt := make(chan time.Time, 1)
	if before.Own().Writable {
		go func() {
			defer close(closedAt)
			if at, err := s.awaitClosed(watchCtx); err == nil {
				closedAt <- at
			}
		}()
	} else {
		close(closedAt)
	}
	err = s.backend.Transfer(ctx, r.GetTo())
	if err == nil {
		err = s.awaitWritable(ctx, r.GetTo())
	}
	opened := time.Now()
	stopWatch()
	at, closed := <-closedAt
	if err != nil {
		return nil, rpcError(err)
	}
	if closed {
		response.PauseMs = float64(opened.Sub(at)) / float64(time.Millisecond)
		response.PauseMeasured = true
	}
	return response, nil
}

// awaitClosed returns when this region was first seen not to take writes, or to
// be closing: it refuses the first of them before it has closed to all.
func (s *service) awaitClosed(ctx context.Context) (time.Time, error) {
	for {
		st, err := s.backend.Status(ctx, false)
		if err != nil {
			return time.Time{}, err
		}
		if own := st.Own(); !own.Writable || own.State == StateDemoting {
			return time.Now(), nil
		}
		if err := sleep(ctx, pausePollInterval); err != nil {
			return time.Time{}, err
		}
	}
}

// awaitWritable waits until region says that it takes writes.
func (s *service) awaitWritable(ctx context.Context, region string) error {
	ctx, cancel := context.WithTimeout(ctx, writableWait)
	defer cancel()
	for {
		st, err := s.backend.Status(ctx, true)
		if err != nil {
			return err
		}
		for _, r := range st.Regions {
			if r.Name == region && r.Reachable && r.Writable {
				return nil
			}
		}
		if err := sleep(ctx, pausePollInterval); err != nil {
			return status.Errorf(codes.DeadlineExceeded, "leadership was handed to %s, which did not open for writes within %v", region, writableWait)
		}
	}
}

func (s *service) LogRead(r *adminpb.LogReadRequest, stream grpc.ServerStreamingServer[adminpb.LogEntry]) error {
	ctx := stream.Context()
	from, left := r.GetFrom(), int(r.GetLimit())
	for {
		err := s.backend.ReadLog(ctx, from, left, r.GetChanges(), func(e LogEntry) error {
			from = uint64(e.Slot) + 1
			if left > 0 {
				left--
			}
			return stream.Send(entryToProto(e))
		})
		if err != nil {
			return rpcError(err)
		}
		if !r.GetFollow() || r.GetLimit() > 0 && left == 0 {
			return nil
		}
		if err := s.awaitSlot(ctx, paxosgroup.Slot(from)); err != nil {
			return rpcError(err)
		}
	}
}

// awaitSlot waits until slot is chosen here.
func (s *service) awaitSlot(ctx context.Context, slot paxosgroup.Slot) error {
	for {
		if err := sleep(ctx, followInterval); err != nil {
			return err
		}
		st, err := s.backend.Status(ctx, false)
		if err != nil {
			return err
		}
		if st.Own().Chosen >= max(slot, 1) {
			return nil
		}
	}
}

func (s *service) MemberApply(ctx context.Context, r *adminpb.MemberApplyRequest) (*adminpb.MemberApplyResponse, error) {
	changes, err := s.backend.ApplyMembers(ctx, r.GetDryRun())
	if err != nil {
		return nil, rpcError(err)
	}
	return &adminpb.MemberApplyResponse{Changes: changes}, nil
}

func (s *service) Version(context.Context, *adminpb.VersionRequest) (*adminpb.VersionResponse, error) {
	v := s.backend.Version()
	return &adminpb.VersionResponse{
		Version:   v.Version,
		Commit:    v.Commit,
		GoVersion: v.GoVersion,
		Protocol:  v.Protocol,
		Postgres:  v.Postgres,
	}, nil
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}

// rpcError gives an error of the backend the code that its caller acts on.
func rpcError(err error) error {
	var notLeader *NotLeaderError
	var cannotLead *CannotLeadError
	switch {
	case errors.Is(err, ErrNoLeader):
		return status.Error(codes.NotFound, err.Error())
	case errors.Is(err, ErrUnknownRegion):
		return status.Error(codes.InvalidArgument, err.Error())
	case errors.Is(err, ErrCompacted):
		return status.Error(codes.OutOfRange, err.Error())
	case errors.As(err, &notLeader), errors.As(err, &cannotLead):
		return status.Error(codes.FailedPrecondition, err.Error())
	case errors.Is(err, context.Canceled):
		return status.Error(codes.Canceled, err.Error())
	case errors.Is(err, context.DeadlineExceeded):
		return status.Error(codes.DeadlineExceeded, err.Error())
	}
	if _, ok := status.FromError(err); ok {
		return err
	}
	return status.Error(codes.Unknown, err.Error())
}
