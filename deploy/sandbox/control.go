package sandbox

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"
)

const socketFile = "sandbox.sock"

// operation is a request on the control socket: POST /OPERATION.
type operation struct {
	Regions []string `json:"regions,omitempty"`
	Part    Part     `json:"part,omitempty"`
}

type answer struct {
	Error  string  `json:"error,omitempty"`
	Status *Status `json:"status,omitempty"`
}

// control serves the supervisor's socket.
type control struct {
	server *http.Server
	served chan struct{}
	socket *shortPath
}

// shortPath is a way to name a file of a directory within the 107 bytes that
// the address of a unix socket has, however deep the directory lies.
type shortPath struct {
	name string
	dir  *os.File // nil if the plain name is short enough
}

func newShortPath(dir, file string) (*shortPath, error) {
	name := filepath.Join(dir, file)
	if len(name) < 100 {
		return &shortPath{name: name}, nil
	}
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	return &shortPath{name: fmt.Sprintf("/proc/self/fd/%d/%s", d.Fd(), file), dir: d}, nil
}

func (p *shortPath) close() {
	if p.dir != nil {
		p.dir.Close()
	}
}

// serveControl answers on the socket. The caller holds the directory's lock, so
// a socket that is there is left over.
func serveControl(s *Supervisor) (*control, error) {
	if err := forget(filepath.Join(s.dir, socketFile)); err != nil {
		return nil, err
	}
	socket, err := newShortPath(s.dir, socketFile)
	if err != nil {
		return nil, err
	}
	listener, err := net.Listen("unix", socket.name)
	if err != nil {
		socket.close()
		return nil, fmt.Errorf("listen on the control socket: %w", err)
	}
	// It commands processes of this user: nobody else's business.
	if err := os.Chmod(socket.name, 0o600); err != nil {
		listener.Close()
		socket.close()
		return nil, err
	}
	mux := http.NewServeMux()
	handle := func(name string, run func(ctx context.Context, o operation) error) {
		mux.HandleFunc("POST /"+name, func(w http.ResponseWriter, req *http.Request) {
			var o operation
			err := json.NewDecoder(http.MaxBytesReader(w, req.Body, 1<<16)).Decode(&o)
			if err == nil {
				// Not the request's context: an operation begun is carried through.
				err = run(context.WithoutCancel(req.Context()), o)
			}
			reply(w, answer{Error: text(err)})
		})
	}
	one := func(run func(ctx context.Context, name string, part Part) error) func(context.Context, operation) error {
		return func(ctx context.Context, o operation) error {
			if len(o.Regions) != 1 {
				return errors.New("name one region")
			}
			return run(ctx, o.Regions[0], o.Part)
		}
	}
	handle("start", one(func(ctx context.Context, name string, _ Part) error { return s.StartRegion(ctx, name) }))
	handle("wipe", one(func(ctx context.Context, name string, _ Part) error { return s.Wipe(ctx, name) }))
	handle("kill", one(s.Kill))
	handle("pause", one(s.Pause))
	handle("resume", one(s.Resume))
	handle("partition", func(ctx context.Context, o operation) error { return s.Partition(ctx, o.Regions...) })
	handle("heal", func(ctx context.Context, o operation) error { return s.Heal(ctx, o.Regions...) })
	handle("await-ready", func(ctx context.Context, _ operation) error { return s.AwaitReady(ctx) })
	mux.HandleFunc("POST /down", func(w http.ResponseWriter, _ *http.Request) {
		// In the background: Down waits for this server's end. Its errors reach
		// whoever runs the supervisor; the caller waits for the lock.
		w.WriteHeader(http.StatusAccepted)
		reply(w, answer{})
		go s.Down() // Done, and a Down of its own, tell the owner
	})
	mux.HandleFunc("GET /status", func(w http.ResponseWriter, req *http.Request) {
		st := s.Status(req.Context())
		reply(w, answer{Status: &st})
	})
	c := &control{server: &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}, served: make(chan struct{}), socket: socket}
	go func() {
		defer close(c.served)
		_ = c.server.Serve(listener) // ends by close
	}()
	return c, nil
}

func (c *control) close() {
	// Answers under way may go out; operations are over or pointless by now.
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	if c.server.Shutdown(ctx) != nil {
		c.server.Close()
	}
	<-c.served
	c.socket.close()
}

func reply(w http.ResponseWriter, a answer) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(a) // an error: the caller is gone
}

func text(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// ErrNotRunning says that no supervisor runs the sandbox.
var ErrNotRunning = errors.New("the sandbox does not run")

// Client speaks to the supervisor of a sandbox. Safe for concurrent use.
type Client struct {
	dir  string
	http *http.Client
}

// Connect returns a client of the supervisor that runs the sandbox in dir, or
// ErrNotRunning, or ErrNoSandbox.
func Connect(dir string) (*Client, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	if _, err := Load(dir); err != nil {
		return nil, err
	}
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		socket, err := newShortPath(dir, socketFile)
		if err != nil {
			return nil, err
		}
		defer socket.close()
		return (&net.Dialer{}).DialContext(ctx, "unix", socket.name)
	}
	conn, err := dial(context.Background(), "", "")
	if err != nil {
		return nil, fmt.Errorf("%w in %s: `paxosctl dev up --dir %s`", ErrNotRunning, dir, dir)
	}
	conn.Close()
	return &Client{dir: dir, http: &http.Client{Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true}}}, nil
}

func (c *Client) call(ctx context.Context, method, path string, o operation) (answer, error) {
	var a answer
	body, err := json.Marshal(o)
	if err != nil {
		return a, err
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://sandbox/"+path, bytes.NewReader(body))
	if err != nil {
		return a, err
	}
	res, err := c.http.Do(req)
	if err != nil {
		return a, fmt.Errorf("ask the supervisor of %s: %w", c.dir, err)
	}
	defer res.Body.Close()
	if err := json.NewDecoder(res.Body).Decode(&a); err != nil {
		return a, fmt.Errorf("read the supervisor's answer, %s: %w", res.Status, err)
	}
	if a.Error != "" {
		return a, errors.New(a.Error)
	}
	return a, nil
}

func (c *Client) operate(ctx context.Context, name string, part Part, regions ...string) error {
	_, err := c.call(ctx, http.MethodPost, name, operation{Regions: regions, Part: part})
	return err
}

// Status is Supervisor.Status.
func (c *Client) Status(ctx context.Context) (Status, error) {
	a, err := c.call(ctx, http.MethodGet, "status", operation{})
	if err != nil {
		return Status{}, err
	}
	return *a.Status, nil
}

// AwaitReady is Supervisor.AwaitReady.
func (c *Client) AwaitReady(ctx context.Context) error { return c.operate(ctx, "await-ready", Both) }

// StartRegion is Supervisor.StartRegion.
func (c *Client) StartRegion(ctx context.Context, name string) error {
	return c.operate(ctx, "start", Both, name)
}

// Kill is Supervisor.Kill.
func (c *Client) Kill(ctx context.Context, name string, part Part) error {
	return c.operate(ctx, "kill", part, name)
}

// Pause is Supervisor.Pause.
func (c *Client) Pause(ctx context.Context, name string, part Part) error {
	return c.operate(ctx, "pause", part, name)
}

// Resume is Supervisor.Resume.
func (c *Client) Resume(ctx context.Context, name string, part Part) error {
	return c.operate(ctx, "resume", part, name)
}

// Partition is Supervisor.Partition.
func (c *Client) Partition(ctx context.Context, names ...string) error {
	return c.operate(ctx, "partition", Both, names...)
}

// Heal is Supervisor.Heal.
func (c *Client) Heal(ctx context.Context, names ...string) error {
	return c.operate(ctx, "heal", Both, names...)
}

// Wipe is Supervisor.Wipe.
func (c *Client) Wipe(ctx context.Context, name string) error {
	return c.operate(ctx, "wipe", Both, name)
}

// Down takes the sandbox down and returns when its supervisor has let go of it.
func (c *Client) Down(ctx context.Context) error {
	if err := c.operate(ctx, "down", Both); err != nil {
		return err
	}
	for {
		lock, err := takeLock(c.dir)
		if err == nil {
			return lock.Close()
		}
		if !errors.Is(err, ErrRunning) {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("the sandbox is not down yet: %w", ctx.Err())
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// CleanUp ends what a supervisor that was killed may have left running of the
// sandbox in dir.
func CleanUp(ctx context.Context, dir string) error {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return err
	}
	d, err := Load(dir)
	if err != nil {
		return err
	}
	lock, err := takeLock(dir)
	if err != nil {
		return err
	}
	defer lock.Close()
	s := &Supervisor{dir: dir, description: d}
	s.regions = regionsOf(dir, d)
	return s.clean(ctx)
}
