package snapshot

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"quorate/replication/entry"
	"quorate/snapshot/snapshotpb"
)

const protocol = 1

// ServerConfig configures the source side.
type ServerConfig struct {
	ClusterID   string
	Source      Source
	BinDir      string // of PostgreSQL's programs, of the server's version: pg_dump is needed; "" if Exported names it
	Publication string // not shipped; default "quorate"
	ImagesMax   int    // open at a time, default 2
	PartBytes   int64  // a larger table goes in several parts, default 64 MiB
	Logger      *slog.Logger

	partPages int64
}

// Server serves images. It is a gRPC service on the sidecar's own port.
type Server struct {
	snapshotpb.UnimplementedSnapshotServer
	cfg ServerConfig

	mu     sync.Mutex
	images map[uint64]*image
	last   uint64
}

// image is an open image. Its fields do not change after it is made, but idle.
type image struct {
	exported *Exported
	manifest *snapshotpb.Manifest
	queries  []partQuery
	ctx      context.Context // ends with the image
	fetches  sync.WaitGroup

	mu   sync.Mutex
	idle []*pgx.Conn // that have adopted the snapshot
}

// NewServer returns a server for the images of cfg.Source.
func NewServer(cfg ServerConfig) (*Server, error) {
	var errs []error
	if cfg.ClusterID == "" {
		errs = append(errs, errors.New("ClusterID: missing"))
	}
	if cfg.Source == nil {
		errs = append(errs, errors.New("Source: missing"))
	}
	if cfg.Publication == "" {
		cfg.Publication = "quorate"
	}
	if cfg.ImagesMax == 0 {
		cfg.ImagesMax = 2
	}
	if cfg.PartBytes == 0 {
		cfg.PartBytes = 64 << 20
	}
	const blockBytes = 8192
	cfg.partPages = max(1, cfg.PartBytes/blockBytes)
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if err := errors.Join(errs...); err != nil {
		return nil, fmt.Errorf("snapshot server: %w", err)
	}
	return &Server{cfg: cfg, images: make(map[uint64]*image)}, nil
}

// Register adds the service to a gRPC server.
func (s *Server) Register(r grpc.ServiceRegistrar) { snapshotpb.RegisterSnapshotServer(r, s) }

// Open implements the service.
func (s *Server) Open(req *snapshotpb.OpenRequest, stream grpc.ServerStreamingServer[snapshotpb.Manifest]) error {
	if req.ClusterId != s.cfg.ClusterID {
		return status.Errorf(codes.PermissionDenied, "this sidecar is of cluster %q, not %q: check the peers' addresses", s.cfg.ClusterID, req.ClusterId)
	}
	if req.Protocol != protocol {
		return status.Errorf(codes.FailedPrecondition, "snapshot protocol %d asked for, this sidecar speaks %d: run the same version in both regions", req.Protocol, protocol)
	}
	// The number of images is what bounds connections and the age of snapshots.
	s.mu.Lock()
	if len(s.images) >= s.cfg.ImagesMax {
		s.mu.Unlock()
		return status.Errorf(codes.ResourceExhausted, "%d images are being shipped already", s.cfg.ImagesMax)
	}
	s.last++
	id := s.last
	s.images[id] = nil
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		delete(s.images, id)
		s.mu.Unlock()
	}()

	ctx, cancel := context.WithCancel(stream.Context())
	defer cancel()
	exported, err := s.cfg.Source.Open(ctx)
	if err != nil {
		return statusOf(fmt.Errorf("open an image: %w", err))
	}
	defer exported.Release()
	img := &image{exported: exported, ctx: ctx, manifest: &snapshotpb.Manifest{Protocol: protocol, Image: id, ClusterId: s.cfg.ClusterID,
		Slot: exported.Slot, Base: exported.Base, Incarnation: exported.Incarnation}}
	defer func() {
		cancel()
		s.mu.Lock()
		delete(s.images, id) // from here on no fetch begins
		s.mu.Unlock()
		img.fetches.Wait()
		for _, conn := range img.idle {
			closeConn(conn)
		}
	}()
	conn, err := img.conn(ctx)
	if err != nil {
		return statusOf(err)
	}
	if img.queries, err = (&survey{conn: conn, m: img.manifest, cfg: &s.cfg}).run(ctx); err != nil {
		closeConn(conn)
		return statusOf(err)
	}
	img.put(conn)
	s.mu.Lock()
	s.images[id] = img
	s.mu.Unlock()
	s.cfg.Logger.Info("shipping an image", "image", id, "slot", exported.Slot, "tables", len(img.manifest.Tables), "parts", len(img.manifest.Parts))
	if err := stream.Send(img.manifest); err != nil {
		return err
	}
	<-ctx.Done()
	return nil
}

// use finds an open image and keeps it until the returned function is called.
func (s *Server) use(id uint64) (*image, func(), error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	img := s.images[id]
	if img == nil || img.ctx.Err() != nil {
		return nil, nil, status.Errorf(codes.NotFound, "image %d is not open", id)
	}
	img.fetches.Add(1)
	return img, img.fetches.Done, nil
}

// Fetch implements the service.
func (s *Server) Fetch(req *snapshotpb.FetchRequest, stream grpc.ServerStreamingServer[snapshotpb.Chunk]) error {
	img, done, err := s.use(req.Image)
	if err != nil {
		return err
	}
	defer done()
	if int(req.Part) > len(img.queries) {
		return status.Errorf(codes.InvalidArgument, "image %d has %d parts, not %d", req.Image, len(img.queries), req.Part)
	}
	ctx, cancel := context.WithCancel(stream.Context())
	defer cancel()
	defer context.AfterFunc(img.ctx, cancel)()
	w := &chunkWriter{part: req.Part, send: stream.Send}
	if req.Part == 0 {
		if err := s.dumpSchema(ctx, img, w); err != nil {
			return statusOf(err)
		}
		return nil
	}
	conn, err := img.conn(ctx)
	if err != nil {
		return statusOf(err)
	}
	tag, err := conn.PgConn().CopyTo(ctx, w, string(img.queries[req.Part-1]))
	if err != nil {
		closeConn(conn)
		return statusOf(fmt.Errorf("read part %d: %w", req.Part, err))
	}
	img.put(conn)
	return w.close(uint64(tag.RowsAffected()))
}

func (s *Server) dumpSchema(ctx context.Context, img *image, w *chunkWriter) error {
	cmd, said, err := program(ctx, cmp.Or(img.exported.BinDir, s.cfg.BinDir), "pg_dump", img.exported.ConnString, sourceSettings,
		"--format=custom", "--compress=0", "--schema-only", "--snapshot="+img.exported.SnapshotName,
		"--exclude-schema="+entry.LocalSchema, "--exclude-schema="+entry.FenceSchema, "--no-subscriptions", "--no-tablespaces", "--encoding=UTF8")
	if err != nil {
		return err
	}
	cmd.Stdout = w
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("pg_dump: %w: %s", err, said)
	}
	return w.close(0)
}

// Complete implements the service.
func (s *Server) Complete(ctx context.Context, req *snapshotpb.CompleteRequest) (*snapshotpb.CompleteResponse, error) {
	img, done, err := s.use(req.Image)
	if err != nil {
		return nil, err
	}
	defer done()
	if img.exported.Verify != nil {
		if err := img.exported.Verify(ctx); err != nil {
			return nil, status.Errorf(codes.Aborted, "image %d is void: %v", req.Image, err)
		}
	}
	return &snapshotpb.CompleteResponse{}, nil
}

// sourceSettings are for reading: an image must not be written differently, or
// cut short, by what a database or role sets.
var sourceSettings = map[string]string{
	"statement_timeout": "0", "lock_timeout": "0", "idle_in_transaction_session_timeout": "0", "row_security": "off",
	"synchronous_commit": "local",
}

// conn returns a connection in a transaction that sees the image.
func (img *image) conn(ctx context.Context) (*pgx.Conn, error) {
	img.mu.Lock()
	if n := len(img.idle); n > 0 {
		conn := img.idle[n-1]
		img.idle = img.idle[:n-1]
		img.mu.Unlock()
		return conn, nil
	}
	img.mu.Unlock()
	cfg, err := pgx.ParseConfig(img.exported.ConnString)
	if err != nil {
		return nil, fmt.Errorf("connection string: %w", err)
	}
	for k, v := range sourceSettings {
		cfg.RuntimeParams[k] = v
	}
	cfg.RuntimeParams["application_name"] = "quorate snapshot"
	cfg.RuntimeParams["client_encoding"] = "UTF8"
	cfg.RuntimeParams["search_path"] = "pg_catalog"
	conn, err := pgx.ConnectConfig(ctx, cfg)
	if err != nil {
		return nil, fmt.Errorf("connect to the local database: %w", err)
	}
	_, err = conn.Exec(ctx, "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
	if err == nil {
		_, err = conn.Exec(ctx, "SET TRANSACTION SNAPSHOT '"+img.exported.SnapshotName+"'")
	}
	if err != nil {
		closeConn(conn)
		return nil, fmt.Errorf("adopt snapshot %q: %w", img.exported.SnapshotName, err)
	}
	return conn, nil
}

func (img *image) put(conn *pgx.Conn) {
	img.mu.Lock()
	defer img.mu.Unlock()
	img.idle = append(img.idle, conn)
}

func closeConn(conn *pgx.Conn) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	_ = conn.Close(ctx) // it is given up, whatever the server says to it
}

// statusOf gives an error a gRPC status if it has none.
func statusOf(err error) error {
	if _, ok := status.FromError(err); ok {
		return err
	}
	return status.Error(codes.Unavailable, err.Error())
}
