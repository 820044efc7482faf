package helper

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
	"time"

	"github.com/isthmus-net/isthmus/image/slot"
)

// Client sends requests to the helper.
type Client struct {
	// Socket is where the helper listens; empty: Socket.
	Socket string
}

// Status returns the state of the slots. On a machine without them the error is slot.ErrNoSlots.
func (c Client) Status(ctx context.Context) (*Status, error) {
	a, err := c.call(ctx, Request{Do: DoStatus}, nil)
	return a.Status, err
}

// Do sends one of the verbs that have no body.
func (c Client) Do(ctx context.Context, verb string) error {
	_, err := c.call(ctx, Request{Do: verb}, nil)
	return err
}

// Write writes the slot that does not run. See slot.Disk.Write.
func (c Client) Write(ctx context.Context, size int64, signature string, older bool, body io.Reader) error {
	_, err := c.call(ctx, Request{Do: DoWrite, Size: size, Signature: signature, Older: older}, body)
	return err
}

// Seal returns data in a form that only this machine's TPM opens. See tpm.TPM.
func (c Client) Seal(ctx context.Context, data []byte) ([]byte, error) {
	a, err := c.call(ctx, Request{Do: DoSeal, Data: data}, nil)
	return a.Data, err
}

// Open returns the data that Seal has sealed.
func (c Client) Open(ctx context.Context, sealed []byte) ([]byte, error) {
	a, err := c.call(ctx, Request{Do: DoOpen, Data: sealed}, nil)
	return a.Data, err
}

// Refusal is why the helper refused a request.
type Refusal struct {
	Text    string
	Invalid bool
}

func (r *Refusal) Error() string { return r.Text }

// Is makes a refusal of a wrong slot an ErrInvalid.
func (r *Refusal) Is(target error) bool { return r.Invalid && target == ErrInvalid }

// answerLimit bounds the time of the helper after it has received everything, in which it reads a
// slot back and checks it.
const answerLimit = 5 * time.Minute

func (c Client) call(ctx context.Context, q Request, body io.Reader) (a Answer, err error) {
	path := c.Socket
	if path == "" {
		path = Socket
	}
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", path)
	if errors.Is(err, os.ErrNotExist) {
		return a, slot.ErrNoSlots
	}
	if err != nil {
		return a, fmt.Errorf("calling the system helper: %w", err)
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })()
	line, err := json.Marshal(q)
	if err != nil {
		return a, err
	}
	if _, err := conn.Write(append(line, '\n')); err != nil {
		return a, fmt.Errorf("calling the system helper: %w", err)
	}
	if body != nil {
		// A helper that refuses early closes its side. Its answer says why, which is better than
		// the broken pipe.
		if _, err := io.Copy(conn, io.LimitReader(body, q.Size)); err != nil && !errors.Is(err, syscall.EPIPE) && !errors.Is(err, syscall.ECONNRESET) {
			return a, fmt.Errorf("sending the slot to the system helper: %w", err)
		}
		if err := conn.(*net.UnixConn).CloseWrite(); err != nil && !errors.Is(err, syscall.ENOTCONN) {
			return a, fmt.Errorf("sending the slot to the system helper: %w", err)
		}
	}
	conn.SetReadDeadline(time.Now().Add(answerLimit))
	if err := json.NewDecoder(bufio.NewReader(io.LimitReader(conn, 64<<10))).Decode(&a); err != nil {
		return a, fmt.Errorf("reading the answer of the system helper: %w", err)
	}
	if a.Error != "" {
		return Answer{}, &Refusal{Text: a.Error, Invalid: a.Invalid}
	}
	return a, nil
}
