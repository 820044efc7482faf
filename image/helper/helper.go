// Package helper does with the machine what the daemon may not: it writes slots and the loader's
// block, and reboots the machine. The daemon has no access to a disk; it sends requests over a
// socket. The helper trusts no request: it checks the signature of a slot itself.
package helper

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/isthmus-net/isthmus/image/slot"
)

// Socket is where the helper listens. Only root and the group isthmus can enter its directory.
const Socket = "/run/isthmus-system/socket"

// Verbs of a request.
const (
	DoStatus   = "status"
	DoWrite    = "write"    // Size bytes follow, for the slot that does not run
	DoTry      = "try"      // the slot that does not run is on trial from the next boot
	DoGood     = "good"     // the running slot is marked good
	DoReject   = "reject"   // the running trial is given up; the next boot is of the good slot
	DoReboot   = "reboot"   // reboot the machine
	DoPoweroff = "poweroff" // switch the machine off
	DoSeal     = "seal"     // return Data in a form that this machine's TPM opens
	DoOpen     = "open"     // return what was sealed as Data
)

// Request is one line of JSON. The connection ends after the answer.
type Request struct {
	Do string `json:"do"`
	// Size, Signature and Older are of DoWrite: the slot's size in bytes, the text of its
	// signature, and whether it may be older than the running one.
	Size      int64  `json:"size,omitempty"`
	Signature string `json:"signature,omitempty"`
	Older     bool   `json:"older,omitempty"`
	// Data is of DoSeal and DoOpen.
	Data []byte `json:"data,omitempty"`
}

// Answer is one line of JSON.
type Answer struct {
	// Error is why the request failed; empty: it succeeded.
	Error string `json:"error,omitempty"`
	// Invalid means that the request can never be fulfilled: the slot or its signature is wrong.
	Invalid bool    `json:"invalid,omitempty"`
	Status  *Status `json:"status,omitempty"`
	Data    []byte  `json:"data,omitempty"`
}

// Status is the state of the slots.
type Status struct {
	Running slot.Name            `json:"running"`
	Env     slot.Env             `json:"env"`
	Slots   map[slot.Name]Inside `json:"slots"`
	// Keys are the IDs of the trusted keys.
	Keys []string `json:"keys"`
	// Deadline is when a running trial is given up; zero: none runs.
	Deadline time.Time `json:"deadline,omitzero"`
}

// Inside is the content of a slot by its signature.
type Inside struct {
	slot.Release
	KeyID string `json:"key,omitempty"`
	// Error is why the content is unknown, or why the slot cannot be started.
	Error string `json:"error,omitempty"`
}

// ErrInvalid means that a slot or its signature is wrong.
var ErrInvalid = errors.New("slot refused")

// TrialLimit is how long after the helper's start a trial is given up that was not marked good.
const TrialLimit = 15 * time.Minute

const (
	requestLimit = 8 << 10 // with tpm.MaxBlob bytes in base64
	// idleLimit is how long a caller may send nothing.
	idleLimit = 30 * time.Second
	callers   = 8
)

// TPM seals small pieces of data; tpm.TPM is one.
type TPM interface {
	Seal(data []byte) ([]byte, error)
	Open(sealed []byte) ([]byte, error)
}

// Options configure a Server.
type Options struct {
	Disk slot.Disk
	Keys slot.Keys
	// Running is the slot that the machine was started from.
	Running slot.Name
	// Machine reboots the machine or switches it off: DoReboot or DoPoweroff.
	Machine func(verb string) error
	// TPM seals for DoSeal and DoOpen.
	TPM TPM
	// Limit replaces TrialLimit; 0: TrialLimit.
	Limit time.Duration
	// TrialEnded, if not nil, is called when the running slot is not, or no longer, on trial.
	TrialEnded func()
	Log        *slog.Logger
}

// Server answers requests.
type Server struct {
	Options
	deadline time.Time

	mu sync.Mutex // held while slots or the loader's block are changed
}

// New returns a server.
func New(o Options) *Server {
	if o.Limit == 0 {
		o.Limit = TrialLimit
	}
	return &Server{Options: o}
}

// Serve answers requests on a listener until ctx is done. It gives up a trial that was not marked
// good in time, and reboots the machine.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	e, err := s.Disk.Env()
	if err != nil {
		return err
	}
	if e.Trial != slot.None && e.Trial == s.Running {
		s.deadline = time.Now().Add(s.Limit)
		go s.await(ctx)
	} else {
		s.trialEnded()
	}
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	places := make(chan struct{}, callers)
	var wg sync.WaitGroup
	defer wg.Wait()
	for {
		conn, err := l.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("serving: %w", err)
		}
		select {
		case places <- struct{}{}:
		default:
			conn.Close()
			continue
		}
		wg.Go(func() {
			defer func() { <-places }()
			defer conn.Close()
			s.answer(ctx, conn)
		})
	}
}

func (s *Server) trialEnded() {
	if s.TrialEnded != nil {
		s.TrialEnded()
	}
}

// await gives up a trial after its limit.
func (s *Server) await(ctx context.Context) {
	select {
	case <-ctx.Done():
		return
	case <-time.After(s.Limit):
	}
	err := s.reject()
	if errors.Is(err, errNoTrial) {
		return
	}
	s.Log.Error("the slot on trial was not marked good in time: the machine returns to the other slot", "slot", s.Running, "limit", s.Limit, "err", err)
	// Retry until the machine reboots, because a slot that was given up must not keep running.
	for {
		err := s.Machine(DoReboot)
		if err == nil {
			return
		}
		s.Log.Error("rebooting the machine failed", "err", err)
		select {
		case <-ctx.Done():
			return
		case <-time.After(rebootPace):
		}
	}
}

// rebootPace is the interval of attempts to reboot.
const rebootPace = 2 * time.Second

// idle is a connection whose peer must not be silent for long.
type idle struct{ net.Conn }

func (c idle) Read(p []byte) (int, error) {
	c.SetReadDeadline(time.Now().Add(idleLimit))
	return c.Conn.Read(p)
}

func (s *Server) answer(ctx context.Context, conn net.Conn) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })()
	r := bufio.NewReaderSize(idle{conn}, requestLimit)
	line, err := r.ReadSlice('\n')
	if err != nil {
		return
	}
	var q Request
	var a Answer
	if err = json.Unmarshal(line, &q); err == nil {
		a, err = s.do(ctx, q, r)
	}
	if err != nil {
		a.Error, a.Invalid = err.Error(), errors.Is(err, ErrInvalid)
		s.Log.Warn("request failed", "do", q.Do, "err", err)
	} else if q.Do != DoStatus && q.Do != DoOpen {
		s.Log.Info("done", "do", q.Do)
	}
	conn.SetWriteDeadline(time.Now().Add(idleLimit))
	if err := json.NewEncoder(conn).Encode(a); err != nil {
		s.Log.Warn("answering failed", "do", q.Do, "err", err)
	}
}

func (s *Server) do(ctx context.Context, q Request, body io.Reader) (a Answer, err error) {
	switch q.Do {
	case DoStatus:
		a.Status, err = s.status()
	case DoWrite:
		err = s.write(ctx, q, body)
	case DoTry:
		err = s.try()
	case DoGood:
		err = s.good()
	case DoReject:
		err = s.reject()
	case DoReboot, DoPoweroff:
		err = s.Machine(q.Do)
	case DoSeal:
		a.Data, err = s.TPM.Seal(q.Data)
	case DoOpen:
		a.Data, err = s.TPM.Open(q.Data)
	default:
		err = fmt.Errorf("%q is not a request", q.Do)
	}
	return a, err
}

func (s *Server) status() (*Status, error) {
	e, err := s.Disk.Env()
	if err != nil {
		return nil, err
	}
	st := &Status{Running: s.Running, Env: e, Slots: map[slot.Name]Inside{}, Keys: s.Keys.IDs()}
	if e.Trial != slot.None && e.Trial == s.Running {
		st.Deadline = s.deadline
	}
	for _, n := range []slot.Name{slot.A, slot.B} {
		sig, err := s.Disk.Signature(n)
		if err != nil {
			st.Slots[n] = Inside{Error: err.Error()}
			continue
		}
		st.Slots[n] = Inside{Release: sig.Release, KeyID: sig.KeyID()}
	}
	return st, nil
}

var (
	errBusy    = errors.New("another upgrade is under way: wait for its end")
	errNoTrial = errors.New("the running slot is not on trial")
)

func (s *Server) write(ctx context.Context, q Request, body io.Reader) error {
	if !s.mu.TryLock() {
		return errBusy
	}
	defer s.mu.Unlock()
	e, err := s.Disk.Env()
	if err != nil {
		return err
	}
	// The other slot is then the only one that is known to be good.
	if e.Good != s.Running {
		return errors.New("the running slot is not marked good yet: wait until it is, or roll back")
	}
	sig, err := slot.ParseSignature([]byte(q.Signature))
	if err != nil {
		return fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	if running, err := s.Disk.Signature(s.Running); err == nil && sig.Release.Serial < running.Release.Serial && !q.Older {
		return fmt.Errorf("%w: it is version %s (serial %d), and version %s (serial %d) runs; give `--older` to install it",
			slot.ErrOlder, sig.Release.Version, sig.Release.Serial, running.Release.Version, running.Release.Serial)
	}
	// From here on, the former content and a trial of it are gone.
	if e.Trial != slot.None || e.Failed != slot.None {
		if err := s.Disk.SetEnv(slot.Env{Good: e.Good}); err != nil {
			return err
		}
	}
	err = s.Disk.Write(ctx, s.Running.Other(), body, q.Size, sig, s.Keys)
	if errors.Is(err, slot.ErrKey) || errors.Is(err, slot.ErrSignature) || errors.Is(err, slot.ErrSize) {
		return fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	return err
}

func (s *Server) try() error {
	if !s.mu.TryLock() {
		return errBusy
	}
	defer s.mu.Unlock()
	e, err := s.Disk.Env()
	if err != nil {
		return err
	}
	if e.Good != s.Running {
		return errors.New("the running slot is on trial itself: reject it to return to the other one")
	}
	other := s.Running.Other()
	if _, err := s.Disk.Signature(other); err != nil {
		return err
	}
	return s.Disk.SetEnv(slot.Env{Good: e.Good, Trial: other, Tries: slot.Tries})
}

func (s *Server) good() error {
	if err := s.endTrial(slot.Env{Good: s.Running}); err != nil {
		return err
	}
	s.trialEnded()
	return nil
}

func (s *Server) reject() error {
	return s.endTrial(slot.Env{Good: s.Running.Other(), Failed: s.Running})
}

// endTrial writes the loader's block without a trial, if the running slot is on trial.
func (s *Server) endTrial(then slot.Env) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	e, err := s.Disk.Env()
	if err != nil {
		return err
	}
	if e.Trial == slot.None || e.Trial != s.Running {
		return errNoTrial
	}
	return s.Disk.SetEnv(then)
}
