package admin

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	"quorate/sidecar/admin/adminpb"
)

const (
	// shutdownWait is how long requests may go on after the end was asked for.
	// Streams end at once: their contexts are those of Run.
	shutdownWait = 2 * time.Second
	// headerWait ends connections that never say what they want.
	headerWait = 10 * time.Second
)

// Config is what a Server needs.
type Config struct {
	Address  string // host:port to listen at
	Backend  Backend
	Gatherer prometheus.Gatherer // what /metrics serves
	Logger   *slog.Logger
}

func (c Config) validate() error {
	var errs []error
	if c.Address == "" {
		errs = append(errs, errors.New("address: missing"))
	}
	if c.Backend == nil {
		errs = append(errs, errors.New("backend: missing"))
	}
	if c.Gatherer == nil {
		errs = append(errs, errors.New("gatherer: missing"))
	}
	if c.Logger == nil {
		errs = append(errs, errors.New("logger: missing"))
	}
	return errors.Join(errs...)
}

// Server serves the administration of one sidecar. Its methods are called from
// one goroutine.
type Server struct {
	cfg      Config
	listener net.Listener
}

// NewServer checks cfg and starts nothing.
func NewServer(cfg Config) (*Server, error) {
	if err := cfg.validate(); err != nil {
		return nil, fmt.Errorf("admin server: %w", err)
	}
	return &Server{cfg: cfg}, nil
}

// Listen takes the address. Run does so too; call it before, to learn early
// that the address is in use.
func (s *Server) Listen() error {
	if s.listener != nil {
		return nil
	}
	l, err := net.Listen("tcp", s.cfg.Address)
	if err != nil {
		return fmt.Errorf("listen.admin: %w: if another process has the address, stop it, or give listen.admin another; it must be this machine's", err)
	}
	s.listener = l
	return nil
}

// Addr is where the server listens; nil before Listen.
func (s *Server) Addr() net.Addr {
	if s.listener == nil {
		return nil
	}
	return s.listener.Addr()
}

// Run serves until ctx ends, and returns nil then. It owns all it starts and
// closes the listener.
func (s *Server) Run(ctx context.Context) error {
	if err := s.Listen(); err != nil {
		return err
	}
	rpc := grpc.NewServer()
	adminpb.RegisterAdminServer(rpc, &service{backend: s.cfg.Backend})
	plain := newPages(s.cfg)

	// gRPC is HTTP/2 without TLS here, told from all else by its content type.
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true)
	server := &http.Server{
		Protocols:         protocols,
		ReadHeaderTimeout: headerWait,
		BaseContext:       func(net.Listener) context.Context { return ctx },
		ErrorLog:          slog.NewLogLogger(s.cfg.Logger.Handler(), slog.LevelDebug),
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.ProtoMajor == 2 && strings.HasPrefix(r.Header.Get("Content-Type"), "application/grpc") {
				rpc.ServeHTTP(w, r)
				return
			}
			plain.ServeHTTP(w, r)
		}),
	}

	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		if err := server.Serve(s.listener); !errors.Is(err, http.ErrServerClosed) {
			return fmt.Errorf("serve administration: %w", err)
		}
		return nil
	})
	g.Go(func() error {
		<-gctx.Done()
		wait, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownWait)
		defer cancel()
		if err := server.Shutdown(wait); err != nil {
			_ = server.Close() // connections that would not end
		}
		rpc.Stop()
		return nil
	})
	return g.Wait()
}
