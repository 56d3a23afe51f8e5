package feed

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats-server/v2/server"
)

// syncInterval is how often the embedded server flushes without SyncAlways.
const syncInterval = time.Second

// payloadBytesMax is the largest message of the embedded server.
const payloadBytesMax = 8 << 20

// ServerConfig of an embedded NATS server with JetStream.
type ServerConfig struct {
	ListenAddr string // for clients, HOST:PORT; port 0 takes a free one
	StoreDir   string
	ServerName string // unique in the cluster, and the same at each start

	// With ClusterListen set, the server is one of several: its streams wait for
	// a majority of itself and Routes. Routes are the
	// cluster addresses of all the others as they are to be reached from here,
	// HOST:PORT. Servers also tell each other of servers that they know; what
	// they tell is an address at which nobody listens, so that only Routes are
	// used, and cutting them cuts the server off.
	ClusterName   string
	ClusterListen string
	Routes        []string

	// SyncAlways flushes each message to disk before it is acknowledged, which
	// makes a large transaction slow. Without it a server that loses power may
	// lose what it acknowledged in its last second; as the log has it all, it
	// is published again then, and only consumers that had read it already see
	// it twice, under the same ids.
	SyncAlways bool

	StoreBytesMax int64 // of all streams on this server. 0: what the disk has

	Logger *slog.Logger // nil: slog.Default()
}

func (c *ServerConfig) options() (*server.Options, error) {
	var errs []error
	if c.StoreDir == "" {
		errs = append(errs, errors.New("store dir: missing"))
	}
	if c.ServerName == "" {
		errs = append(errs, errors.New("server name: missing"))
	}
	host, port, err := splitAddr(c.ListenAddr)
	if err != nil {
		errs = append(errs, fmt.Errorf("listen address: %w", err))
	}
	o := &server.Options{
		ServerName:             c.ServerName,
		Host:                   host,
		Port:                   port,
		NoSigs:                 true,
		JetStream:              true,
		StoreDir:               c.StoreDir,
		SyncAlways:             c.SyncAlways,
		SyncInterval:           syncInterval,
		JetStreamMaxStore:      c.StoreBytesMax,
		MaxPayload:             payloadBytesMax,
		DisableJetStreamBanner: true,
	}
	if c.ClusterListen != "" {
		if c.ClusterName == "" {
			errs = append(errs, errors.New("cluster name: missing"))
		}
		host, port, err := splitAddr(c.ClusterListen)
		if err != nil {
			errs = append(errs, fmt.Errorf("cluster listen address: %w", err))
		}
		if len(c.Routes) == 0 {
			errs = append(errs, errors.New("routes: a server of a cluster needs those to the others"))
		}
		o.Cluster = server.ClusterOpts{
			Name: c.ClusterName, Host: host, Port: port,
			NoAdvertise: true,
			Advertise:   nobody, // see Routes
		}
		for _, r := range c.Routes {
			if _, _, err := splitAddr(r); err != nil {
				errs = append(errs, fmt.Errorf("route: %w", err))
				continue
			}
			o.Routes = append(o.Routes, &url.URL{Scheme: "nats-route", Host: r})
		}
	} else if len(c.Routes) > 0 {
		errs = append(errs, errors.New("routes: need a cluster listen address"))
	}
	if c.Logger == nil {
		c.Logger = slog.Default()
	}
	return o, errors.Join(errs...)
}

// nobody is an address at which nobody listens.
const nobody = "127.0.0.1:1"

// splitAddr splits HOST:PORT. The server takes port 0 for its default, and -1
// for any.
func splitAddr(addr string) (string, int, error) {
	host, p, err := net.SplitHostPort(addr)
	if err != nil {
		return "", 0, err
	}
	port, err := strconv.ParseUint(p, 10, 16)
	if err != nil {
		return "", 0, fmt.Errorf("%q: port: %w", addr, err)
	}
	if port == 0 {
		return host, -1, nil
	}
	return host, int(port), nil
}

// Server is an embedded NATS server.
type Server struct {
	server    *server.Server
	clustered bool
	routes    int
}

// startTimeout bounds the wait for the listening socket.
const startTimeout = 10 * time.Second

// StartServer starts a server and returns once it listens. JetStream of a
// cluster is usable later, when more than half of the servers have met and
// elected a leader: see Ready.
func StartServer(cfg ServerConfig) (*Server, error) {
	o, err := cfg.options()
	if err != nil {
		return nil, fmt.Errorf("NATS server: %w", err)
	}
	// The server would end the process on some failures to listen.
	for _, addr := range []string{cfg.ListenAddr, cfg.ClusterListen} {
		if addr == "" {
			continue
		}
		l, err := net.Listen("tcp", addr)
		if err != nil {
			return nil, fmt.Errorf("NATS server: %w: if another process has the address, stop it, or give the server another (listen.nats, listen.nats_cluster)", err)
		}
		if err := l.Close(); err != nil {
			return nil, fmt.Errorf("NATS server: %w", err)
		}
	}
	ns, err := server.NewServer(o)
	if err != nil {
		return nil, fmt.Errorf("NATS server: %w", err)
	}
	log := &serverLog{logger: cfg.Logger.With("component", "nats")}
	ns.SetLoggerV2(log, false, false, false)
	ns.Start()
	if !ns.ReadyForConnections(startTimeout) {
		ns.Shutdown()
		ns.WaitForShutdown()
		if fatal := log.fatal.Load(); fatal != nil {
			return nil, fmt.Errorf("NATS server: %s", *fatal)
		}
		return nil, fmt.Errorf("NATS server does not listen on %s after %v", cfg.ListenAddr, startTimeout)
	}
	return &Server{server: ns, clustered: cfg.ClusterListen != "", routes: len(cfg.Routes)}, nil
}

// URL is where clients connect.
func (s *Server) URL() string { return s.server.ClientURL() }

// ClusterAddr is where routes connect; empty without a cluster.
func (s *Server) ClusterAddr() string {
	if !s.clustered {
		return ""
	}
	return s.server.ClusterAddr().String()
}

// State says in words whether JetStream is usable.
func (s *Server) State() string {
	switch {
	case !s.server.Running():
		return "stopped"
	case !s.server.JetStreamEnabled():
		return "JetStream is switched off; see the log"
	case !s.clustered || s.server.JetStreamIsLeader() || s.server.JetStreamIsCurrent():
		return "ready"
	}
	return fmt.Sprintf("JetStream waits for a leader: %d of %d routes are up", s.server.NumRemotes(), s.routes)
}

// Ready waits until JetStream is usable, or ctx ends.
func (s *Server) Ready(ctx context.Context) error {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		state := s.State()
		if state == "ready" {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("NATS server: %s: %w", state, ctx.Err())
		case <-tick.C:
		}
	}
}

// Close stops the server and waits until it has ended.
func (s *Server) Close() {
	s.server.Shutdown()
	s.server.WaitForShutdown()
}

// serverLog passes the server's log on. Its notices are many and of interest
// only when looking for a fault.
type serverLog struct {
	logger *slog.Logger
	fatal  atomic.Pointer[string] // why the server does not start
}

func (l *serverLog) Noticef(format string, v ...any) { l.logger.Debug(fmt.Sprintf(format, v...)) }
func (l *serverLog) Warnf(format string, v ...any)   { l.logger.Warn(fmt.Sprintf(format, v...)) }
func (l *serverLog) Debugf(format string, v ...any)  { l.logger.Debug(fmt.Sprintf(format, v...)) }
func (l *serverLog) Tracef(string, ...any)           {}

func (l *serverLog) Errorf(format string, v ...any) {
	level, text := slog.LevelError, fmt.Sprintf(format, v...)
	if strings.Contains(text, "dial tcp "+nobody+":") {
		level = slog.LevelDebug // as it is meant to be
	}
	l.logger.Log(context.Background(), level, text)
}

// Fatalf does not end the process, as the server's own log would.
func (l *serverLog) Fatalf(format string, v ...any) {
	text := fmt.Sprintf(format, v...)
	l.fatal.Store(&text)
	l.logger.Error(text)
}
