package sandbox

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"testing"

	"go.yaml.in/yaml/v3"
)

// The tests of this package are about processes, files and relays, so they run
// this test binary in the sidecar's place: it reads the configuration, listens
// where it says, and answers /status. What a real sidecar makes of the sandbox
// is tested in test/cluster.
const standInVariable = "QUORATE_SANDBOX_TEST_STAND_IN"

func TestMain(m *testing.M) {
	if mode := os.Getenv(standInVariable); mode != "" {
		if err := standIn(mode); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

func standIn(mode string) error {
	if mode == "broken" {
		return fmt.Errorf("the stand-in is told to fail")
	}
	if len(os.Args) != 4 || os.Args[1] != "run" || os.Args[2] != "--config" {
		return fmt.Errorf("started as %q", os.Args)
	}
	b, err := os.ReadFile(os.Args[3])
	if err != nil {
		return err
	}
	var c struct {
		Region  string
		DataDir string `yaml:"data_dir"`
		Leader  string `yaml:"preferred_leader"`
		Listen  struct{ Peer, Admin string }
	}
	if err := yaml.Unmarshal(b, &c); err != nil {
		return err
	}
	if err := os.MkdirAll(c.DataDir, 0o755); err != nil {
		return err
	}
	peer, err := net.Listen("tcp", c.Listen.Peer)
	if err != nil {
		return err
	}
	go func() {
		for {
			conn, err := peer.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				_, _ = io.Copy(conn, conn)
			}()
		}
	}()
	http.HandleFunc("GET /status", func(w http.ResponseWriter, _ *http.Request) {
		_ = json.NewEncoder(w).Encode(Health{
			Region: c.Region, Role: "follower", Leader: c.Leader, Writable: c.Region == c.Leader,
			Chosen: 7, Applied: 7, Healthy: true, State: "standing in",
		})
	})
	return http.ListenAndServe(c.Listen.Admin, nil)
}
