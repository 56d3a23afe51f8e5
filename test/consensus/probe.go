package main

import (
	"context"
	"fmt"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// The echo service answers with what it gets. It stands beside the peer service
// on the same server, with the same options.
var echoService = grpc.ServiceDesc{
	ServiceName: "quorate.bench.Echo",
	HandlerType: (*any)(nil),
	Methods: []grpc.MethodDesc{{MethodName: "Unary", Handler: func(_ any, _ context.Context, decode func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
		var m wrapperspb.BytesValue
		return &m, decode(&m)
	}}},
	Streams: []grpc.StreamDesc{{StreamName: "Stream", ClientStreams: true, ServerStreams: true, Handler: func(_ any, s grpc.ServerStream) error {
		var m wrapperspb.BytesValue
		for {
			if err := s.RecvMsg(&m); err != nil {
				return nil // the caller has gone
			}
			if err := s.SendMsg(&m); err != nil {
				return err
			}
		}
	}}},
}

func registerEcho(s *grpc.Server) { s.RegisterService(&echoService, struct{}{}) }

// probeEcho returns the p50 of count echoes each: of a call, and on a stream
// that is open already.
func probeEcho(address string, size, count int) (map[string]dur, error) {
	conn, err := grpc.NewClient("passthrough:///"+address, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithReadBufferSize(32<<10), grpc.WithWriteBufferSize(128<<10))
	if err != nil {
		return nil, fmt.Errorf("echo: %w", err)
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	out, in := wrapperspb.Bytes(make([]byte, size)), &wrapperspb.BytesValue{}
	call := func() error { return conn.Invoke(ctx, "/quorate.bench.Echo/Unary", out, in) }
	stream, err := conn.NewStream(ctx, &echoService.Streams[0], "/quorate.bench.Echo/Stream")
	if err != nil {
		return nil, fmt.Errorf("echo: %w", err)
	}
	turn := func() error {
		if err := stream.SendMsg(out); err != nil {
			return err
		}
		return stream.RecvMsg(in)
	}
	times := make(map[string]dur)
	for name, f := range map[string]func() error{"call": call, "stream": turn} {
		var each []time.Duration
		for i := range count + count/10 {
			began := time.Now()
			if err := f(); err != nil {
				return nil, fmt.Errorf("echo: %w", err)
			}
			if i >= count/10 { // the first ones warm up
				each = append(each, time.Since(began))
			}
		}
		slices.Sort(each)
		times[name] = each[len(each)/2]
	}
	return times, nil
}

// probeFlush returns the p50 of count flushes of size bytes written over in a
// file that has its length already.
func probeFlush(path string, size, count int) (time.Duration, error) {
	f, err := os.Create(path)
	if err != nil {
		return 0, err
	}
	defer os.Remove(path)
	defer f.Close()
	const fileBytes = 1 << 20
	if _, err := f.Write(make([]byte, fileBytes)); err != nil {
		return 0, err
	}
	if err := f.Sync(); err != nil {
		return 0, err
	}
	buf := make([]byte, size)
	each := make([]time.Duration, count)
	offset := int64(0)
	for i := range each {
		buf[0]++
		began := time.Now()
		if _, err := f.WriteAt(buf, offset); err != nil {
			return 0, err
		}
		if err := unix.Fdatasync(int(f.Fd())); err != nil {
			return 0, err
		}
		each[i] = time.Since(began)
		offset = (offset + int64(size)) % (fileBytes - int64(size))
	}
	slices.Sort(each)
	return each[count/2], nil
}
