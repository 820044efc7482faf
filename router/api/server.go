package api

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/reflection"

	"github.com/isthmus-net/isthmus/router/auth"
	"github.com/isthmus-net/isthmus/router/event"
	"github.com/isthmus-net/isthmus/router/logs"
)

// Options are the listeners of a Server and the parts that it serves.
type Options struct {
	Router    Router
	Authority *auth.Authority
	// Events is the log of the node's events. Nil: its methods are UNIMPLEMENTED.
	Events *event.Log
	// Logs has the last lines of the daemon's log. Nil: its methods are UNIMPLEMENTED.
	Logs *logs.Log
	// Machine is the machine that the router runs on. Nil: its methods are UNIMPLEMENTED.
	Machine Machine
	// Address is the host and port for mutual TLS. Empty: none.
	Address string
	// Socket is the path of the unix socket for root on this node. Empty: none.
	Socket string
	// Metrics answers /metrics over mutual TLS. Nil: there is no such page.
	Metrics http.Handler
	// Log receives the panics of calls. Nil: slog.Default.
	Log *slog.Logger
}

// Server has its listeners open and is ready to serve.
type Server struct {
	grpc      *grpc.Server
	health    *health.Server
	services  *services
	listeners []net.Listener
	address   net.Addr
	web       *http.Server // nil: there are no pages
	pages     *auth.Web    // the listener of web
}

// connections has the keepalive and the maximum age of connections. One that is a day old takes no
// new calls, and stays open for its watches.
var connections = keepalive.ServerParameters{
	Time:             time.Minute,
	Timeout:          20 * time.Second,
	MaxConnectionAge: 24 * time.Hour,
}

// stopTimeout is how long calls under way may take when the server stops.
const stopTimeout = 3 * time.Second

// Listen opens the listeners. It replaces a socket file that a former process left, unless another
// daemon still accepts connections on it.
func Listen(o Options) (*Server, error) {
	s := &Server{
		health:   health.NewServer(),
		services: &services{router: o.Router, machine: o.Machine, authority: o.Authority, events: o.Events, logs: o.Logs, stopping: make(chan struct{}), reading: newGate("with documents"), writing: newGate("with documents"), listing: newGate("for BGP paths"), applying: newGate("for a generation"), watchingLogs: newGateFor("for lines of the log", maxLogWatches, maxLogWatchesPerClient), pinging: make(chan struct{}, maxPings), capturing: make(chan struct{}, maxCaptures)},
	}
	if o.Log == nil {
		o.Log = slog.Default()
	}
	if err := s.listen(o); err != nil {
		s.close()
		return nil, err
	}
	if o.Metrics != nil && s.address != nil {
		s.pages = auth.NewWeb(s.address)
		s.web = newWeb(o.Authority, s.pages, o.Metrics, o.Log)
	}
	s.grpc = grpc.NewServer(
		grpc.Creds(o.Authority.Credentials(s.pages)),
		grpc.ChainUnaryInterceptor(reasonUnary, o.Authority.Unary(describe, o.Router.Generation), recoverUnary(o.Log)),
		grpc.ChainStreamInterceptor(reasonStream, o.Authority.Stream(describe, o.Router.Generation), recoverStream(o.Log)),
		grpc.MaxRecvMsgSize(maxDocument+64<<10),
		grpc.MaxHeaderListSize(16<<10),
		grpc.MaxConcurrentStreams(100),
		grpc.ConnectionTimeout(10*time.Second),
		grpc.KeepaliveParams(connections),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 10 * time.Second, PermitWithoutStream: true}),
	)
	s.services.register(s.grpc)
	grpc_health_v1.RegisterHealthServer(s.grpc, s.health)
	reflection.Register(s.grpc)
	if err := auth.Check(s.grpc.GetServiceInfo()); err != nil {
		s.close()
		return nil, fmt.Errorf("checking access rules: %w", err)
	}
	return s, nil
}

// close closes the listeners of a server that does not serve.
func (s *Server) close() {
	for _, l := range s.listeners {
		l.Close()
	}
}

func (s *Server) listen(o Options) error {
	if o.Socket != "" {
		l, err := listenUnix(o.Socket)
		if err != nil {
			return fmt.Errorf("listening on %s: %w", o.Socket, err)
		}
		s.listeners = append(s.listeners, l)
	}
	if o.Address != "" {
		// The machine may get the address later, as at boot.
		listen := net.ListenConfig{Control: freebind}
		l, err := listen.Listen(context.Background(), "tcp", o.Address)
		if err != nil {
			return fmt.Errorf("listening on %s: %w", o.Address, err)
		}
		s.listeners = append(s.listeners, l)
		s.address = l.Addr()
	}
	return nil
}

// freebind allows binding to an address that the machine does not have yet (IP_FREEBIND, ip(7)).
func freebind(network, _ string, c syscall.RawConn) error {
	var err error
	failed := c.Control(func(fd uintptr) {
		if network == "tcp6" {
			err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_FREEBIND, 1)
		} else {
			err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_FREEBIND, 1)
		}
	})
	return errors.Join(failed, err)
}

func listenUnix(path string) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, err
	}
	switch info, err := os.Lstat(path); {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return nil, err
	case info.Mode().Type() != fs.ModeSocket:
		return nil, errors.New("the file at this path is not a socket")
	default:
		if c, err := net.Dial("unix", path); err == nil {
			return nil, errors.Join(errors.New("another daemon serves this socket"), c.Close())
		}
		if err := os.Remove(path); err != nil {
			return nil, err
		}
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

// Address returns the address of the mutual TLS listener, nil if there is none.
func (s *Server) Address() net.Addr { return s.address }

// Serve serves until ctx is done or a listener fails. Calls under way then have stopTimeout to end.
func (s *Server) Serve(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	for _, l := range s.listeners {
		go func() {
			if err := s.grpc.Serve(l); err != nil {
				cancel(fmt.Errorf("serving on %s: %w", l.Addr(), err))
			}
		}()
	}
	if s.web != nil {
		go func() {
			if err := s.web.Serve(s.pages); !errors.Is(err, http.ErrServerClosed) {
				cancel(fmt.Errorf("serving pages: %w", err))
			}
		}()
	}
	s.followHealth(ctx)

	close(s.services.stopping)
	if s.web != nil {
		_ = s.web.Close() // Prometheus asks again
	}
	s.health.Shutdown()
	force := time.AfterFunc(stopTimeout, s.grpc.Stop)
	defer force.Stop()
	s.grpc.GracefulStop()
	if err := context.Cause(ctx); !errors.Is(err, context.Canceled) && !errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	return nil
}

// Pace of reading the health: conditions also appear and end with time, without a change.
const (
	healthPause  = 100 * time.Millisecond
	healthPeriod = 2 * time.Second
)

// followHealth reports the health of the node and of its objects; see Router.Health. A condition
// that has ended serves, and an object that is gone is unknown.
func (s *Server) followHealth(ctx context.Context) {
	reported := map[string]grpc_health_v1.HealthCheckResponse_ServingStatus{}
	for {
		changed := s.services.router.Changed()
		now := s.services.router.Health()
		for name := range reported {
			if _, present := now[name]; !present {
				now[name] = strings.HasPrefix(name, "condition/")
				if !now[name] {
					s.health.SetServingStatus(name, grpc_health_v1.HealthCheckResponse_SERVICE_UNKNOWN)
					delete(reported, name)
					delete(now, name)
				}
			}
		}
		// The whole node last, so that the cause is there when its watcher looks.
		for _, name := range append(slices.Sorted(maps.Keys(now))[1:], "") {
			serves := now[name]
			state := grpc_health_v1.HealthCheckResponse_NOT_SERVING
			if serves {
				state = grpc_health_v1.HealthCheckResponse_SERVING
			}
			if reported[name] != state {
				reported[name] = state
				s.health.SetServingStatus(name, state)
			}
		}
		// A busy node changes all the time; reading the health of thousands of objects takes some
		// milliseconds.
		select {
		case <-time.After(healthPause + time.Duration(len(now))*50*time.Microsecond):
		case <-ctx.Done():
			return
		}
		select {
		case <-changed:
		case <-time.After(healthPeriod):
		case <-ctx.Done():
			return
		}
	}
}
