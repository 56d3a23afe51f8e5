package feed

import (
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// Two servers that know only a third hear of each other through it, but must
// not connect: a region is to be reached as configured, or not at all.
func TestRoutesOnlyAsConfigured(t *testing.T) {
	dir := t.TempDir()
	launch := func(name string, routes ...string) *Server {
		t.Helper()
		s, err := StartServer(ServerConfig{
			ListenAddr: "127.0.0.1:0", StoreDir: filepath.Join(dir, name), ServerName: name,
			ClusterName: "test", ClusterListen: "127.0.0.1:0", Routes: routes, Logger: quiet(),
		})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(s.Close)
		return s
	}
	hub := launch("hub", "127.0.0.1:1")
	a, b := launch("a", hub.ClusterAddr()), launch("b", hub.ClusterAddr())
	deadline := time.Now().Add(5 * time.Second)
	for hub.server.NumRemotes() < 2 {
		if time.Now().After(deadline) {
			t.Fatalf("the hub has %d routes", hub.server.NumRemotes())
		}
		time.Sleep(5 * time.Millisecond)
	}
	time.Sleep(700 * time.Millisecond) // for what gossip would do
	if na, nb := a.server.NumRemotes(), b.server.NumRemotes(); na != 1 || nb != 1 {
		t.Errorf("a has %d routes, b has %d: they found each other", na, nb)
	}
}

func TestServerConfig(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	good := ServerConfig{ListenAddr: "127.0.0.1:0", StoreDir: t.TempDir(), ServerName: "n", Logger: quiet()}
	for _, tc := range []struct {
		name  string
		spoil func(*ServerConfig)
		want  string
	}{
		{"no directory", func(c *ServerConfig) { c.StoreDir = "" }, "store dir"},
		{"no name", func(c *ServerConfig) { c.ServerName = "" }, "server name"},
		{"address without a port", func(c *ServerConfig) { c.ListenAddr = "localhost" }, "listen address"},
		{"port in use", func(c *ServerConfig) { c.ListenAddr = taken.Addr().String() }, "address already in use"},
		{"cluster port in use", func(c *ServerConfig) {
			c.ClusterName, c.ClusterListen, c.Routes = "c", taken.Addr().String(), []string{"127.0.0.1:1"}
		}, "address already in use"},
		{"routes without a cluster", func(c *ServerConfig) { c.Routes = []string{"127.0.0.1:1"} }, "routes"},
		{"cluster without routes", func(c *ServerConfig) { c.ClusterName, c.ClusterListen = "c", "127.0.0.1:0" }, "routes"},
		{"cluster without a name", func(c *ServerConfig) { c.ClusterListen = "127.0.0.1:0" }, "cluster name"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			cfg := good
			tc.spoil(&cfg)
			s, err := StartServer(cfg)
			if err == nil {
				s.Close()
				t.Fatal("accepted")
			}
			if !strings.Contains(err.Error(), tc.want) {
				t.Errorf("%v does not say %q", err, tc.want)
			}
		})
	}
}
