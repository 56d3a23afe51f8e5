package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"quorate/deploy/sandbox"
	"quorate/sidecar/admin/adminpb"
)

const (
	defaultSandboxDir   = ".sandbox"
	defaultAdminAddress = "127.0.0.1:7461" // that of a sidecar's configuration
	// answerWait is how long a sidecar may take to tell how it is; a paused one
	// accepts connections and says nothing.
	answerWait = 2 * time.Second
)

const addressingHelp = `Which cluster: --addr asks the sidecar at that address. Otherwise --dir, or
./.sandbox where it exists, means a sandbox: all its regions are asked. Otherwise
the sidecar of this machine is asked, at ` + defaultAdminAddress + `.`

// addressing finds the sidecars to ask.
type addressing struct {
	addr string
}

// addFlags gives cmd the flags that say which cluster is meant, but for --dir,
// which is the root command's.
func (a *addressing) addFlags(cmd *cobra.Command) {
	cmd.PersistentFlags().StringVar(&a.addr, "addr", "", "`host:port` of a sidecar's listen.admin")
}

// endpoint is one sidecar's administrative address.
type endpoint struct {
	Name  string // of the region; empty if not known
	Admin string
}

// endpoints lists the sidecars that may be asked: at least one.
func (a *addressing) endpoints(cmd *cobra.Command) ([]endpoint, error) {
	if a.addr != "" {
		return []endpoint{{Admin: a.addr}}, nil
	}
	dir, given := "", false
	if f := cmd.Flag("dir"); f != nil {
		dir, given = f.Value.String(), f.Changed
	}
	if dir == "" {
		dir = defaultSandboxDir
	}
	described, err := sandbox.Load(dir)
	if errors.Is(err, sandbox.ErrNoSandbox) && !given {
		return []endpoint{{Admin: defaultAdminAddress}}, nil
	}
	if err != nil {
		return nil, err
	}
	var found []endpoint
	for _, r := range described.Regions {
		found = append(found, endpoint{Name: r.Name, Admin: r.Address("admin")})
	}
	if len(found) == 0 {
		return nil, fmt.Errorf("the sandbox in %s has no region", dir)
	}
	return found, nil
}

// dialLeader connects to the sidecar of the leader region, or to the first given
// if that region is not among those given: it answers with what to do.
func (a *addressing) dialLeader(cmd *cobra.Command, leader string) (*grpc.ClientConn, error) {
	endpoints, err := a.endpoints(cmd)
	if err != nil {
		return nil, err
	}
	target := endpoints[0]
	for _, e := range endpoints {
		if e.Name == leader {
			target = e
		}
	}
	return dial(target)
}

// dial connects to a sidecar; the connection is made at the first call.
func dial(e endpoint) (*grpc.ClientConn, error) {
	conn, err := grpc.NewClient(e.Admin, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithNoProxy())
	if err != nil {
		return nil, coded(exitUsage, "address %s: %w", e.Admin, err)
	}
	return conn, nil
}

// answered is what came of asking one endpoint.
type answered[T any] struct {
	endpoint endpoint
	value    T
	err      error
}

// ask calls every endpoint at once and returns the answers in the order of the
// endpoints when all are there or, earlier, when enough says so. Those that did
// not come hold an error.
func ask[T any](ctx context.Context, endpoints []endpoint, enough func([]answered[T]) bool,
	call func(context.Context, adminpb.AdminClient) (T, error)) []answered[T] {
	ctx, cancel := context.WithTimeout(ctx, answerWait)
	type indexed struct {
		index  int
		answer answered[T]
	}
	results := make(chan indexed)
	for i, e := range endpoints {
		go func() {
			a := answered[T]{endpoint: e}
			conn, err := dial(e)
			if err != nil {
				a.err = err
			} else {
				a.value, a.err = call(ctx, adminpb.NewAdminClient(conn))
				_ = conn.Close() // nothing was left unread
			}
			results <- indexed{i, a}
		}()
	}
	answers := make([]answered[T], len(endpoints))
	for i, e := range endpoints {
		answers[i] = answered[T]{endpoint: e, err: errors.New("not waited for")}
	}
	stopped := false
	for range endpoints { // all, so that no goroutine is left behind
		r := <-results
		if stopped {
			continue
		}
		answers[r.index] = r.answer
		if enough(answers) {
			stopped = true
			cancel()
		}
	}
	cancel()
	return answers
}

// all waits for every endpoint.
func all[T any]([]answered[T]) bool { return false }

// first stops at the first endpoint that answers.
func first[T any](answers []answered[T]) bool {
	for _, a := range answers {
		if a.err == nil {
			return true
		}
	}
	return false
}

// unreachable is the error of a command that no sidecar answered.
func unreachable[T any](answers []answered[T]) error {
	reasons := make([]string, len(answers))
	for i, a := range answers {
		reasons[i] = fmt.Sprintf("%s: %v", a.endpoint.Admin, fromRPC("ask", a.err))
	}
	return coded(exitUnreachable, "no sidecar answers (%s); is it running, and is this its listen.admin?", strings.Join(reasons, "; "))
}
