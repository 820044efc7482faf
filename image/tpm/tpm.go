// Package tpm seals data with the machine's TPM 2.0.
package tpm

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
	"github.com/google/go-tpm/tpm2/transport/linuxtpm"
	"github.com/google/go-tpm/tpm2/transport/linuxudstpm"
)

// TPM seals small pieces of data with the machine's TPM 2.0. They open only on this machine, and
// only while PCR 7, which measures the state of Secure Boot and its keys (TCG PC Client Platform
// Firmware Profile), is unchanged.
//
// The sealed object and its parent key have the attribute noDA: they open in spite of wrong guesses
// at other objects in the TPM and of power losses that a TPM counts as such. systemd-creds(1) of
// systemd 252 and 257 makes the parent key without it, and a TPM in lockout then refuses it.
type TPM struct {
	// Path is that of the kernel's resource manager, or the socket of a software TPM; empty:
	// Device.
	Path string

	mu sync.Mutex // a TPM runs one command at a time
}

// Device is the kernel's resource manager of the first TPM.
const Device = "/dev/tpmrm0"

// MaxSealed bounds the data to seal, in bytes: a TPM accepts no more (MAX_SYM_DATA). MaxBlob bounds
// the result.
const (
	MaxSealed = 128
	MaxBlob   = 4 << 10
)

// blob is sealed data as the TPM returns it: only that TPM can read it.
type blob struct {
	Public  []byte `json:"public"`
	Private []byte `json:"private"`
}

// pcr7 selects the only register that an upgrade of the image does not change.
var pcr7 = tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{{Hash: tpm2.TPMAlgSHA256, PCRSelect: tpm2.PCClientCompatible.PCRs(7)}}}

// Seal returns data, of 1 to 128 bytes, in a form that only this machine opens.
func (p *TPM) Seal(data []byte) (sealed []byte, err error) {
	if len(data) == 0 || len(data) > MaxSealed {
		return nil, fmt.Errorf("sealing with the TPM: %d bytes, want 1 to %d", len(data), MaxSealed)
	}
	err = p.with("sealing", func(t transport.TPM, parent *tpm2.CreatePrimaryResponse, salted tpm2.AuthOption) error {
		policy, err := policyNow(t)
		if err != nil {
			return err
		}
		made, err := tpm2.Create{
			ParentHandle: tpm2.AuthHandle{Handle: parent.ObjectHandle, Name: parent.Name, Auth: tpm2.HMAC(tpm2.TPMAlgSHA256, 16, salted, tpm2.AESEncryption(128, tpm2.EncryptIn))},
			InSensitive:  tpm2.TPM2BSensitiveCreate{Sensitive: &tpm2.TPMSSensitiveCreate{Data: tpm2.NewTPMUSensitiveCreate(&tpm2.TPM2BSensitiveData{Buffer: data})}},
			InPublic: tpm2.New2B(tpm2.TPMTPublic{
				Type: tpm2.TPMAlgKeyedHash, NameAlg: tpm2.TPMAlgSHA256, AuthPolicy: policy,
				ObjectAttributes: tpm2.TPMAObject{FixedTPM: true, FixedParent: true, NoDA: true},
			}),
		}.Execute(t)
		if err != nil {
			return err
		}
		sealed, err = json.Marshal(blob{Public: made.OutPublic.Bytes(), Private: made.OutPrivate.Buffer})
		return err
	})
	return sealed, err
}

// Open returns the data that Seal has sealed.
func (p *TPM) Open(sealed []byte) (data []byte, err error) {
	if len(sealed) > MaxBlob {
		return nil, fmt.Errorf("opening with the TPM: %d bytes, want at most %d", len(sealed), MaxBlob)
	}
	var b blob
	if err := json.Unmarshal(sealed, &b); err != nil {
		return nil, fmt.Errorf("opening with the TPM: %w", err)
	}
	err = p.with("opening", func(t transport.TPM, parent *tpm2.CreatePrimaryResponse, salted tpm2.AuthOption) error {
		object, err := tpm2.Load{
			ParentHandle: tpm2.AuthHandle{Handle: parent.ObjectHandle, Name: parent.Name, Auth: tpm2.HMAC(tpm2.TPMAlgSHA256, 16, salted)},
			InPublic:     tpm2.BytesAs2B[tpm2.TPMTPublic](b.Public), InPrivate: tpm2.TPM2BPrivate{Buffer: b.Private},
		}.Execute(t)
		if errors.Is(err, tpm2.TPMRCIntegrity) {
			return fmt.Errorf("another TPM has sealed it, or this one was cleared: %w", err)
		}
		if err != nil {
			return err
		}
		defer tpm2.FlushContext{FlushHandle: object.ObjectHandle}.Execute(t)
		session, end, err := tpm2.PolicySession(t, tpm2.TPMAlgSHA256, 16, salted, tpm2.AESEncryption(128, tpm2.EncryptOut))
		if err != nil {
			return err
		}
		defer end()
		if _, err := (tpm2.PolicyPCR{PolicySession: session.Handle(), Pcrs: pcr7}).Execute(t); err != nil {
			return err
		}
		out, err := tpm2.Unseal{ItemHandle: tpm2.AuthHandle{Handle: object.ObjectHandle, Name: object.Name, Auth: session}}.Execute(t)
		if errors.Is(err, tpm2.TPMRCPolicyFail) {
			return fmt.Errorf("PCR 7 has changed, for example with Secure Boot or its keys: %w", err)
		}
		if err != nil {
			return err
		}
		data = out.OutData.Buffer
		return nil
	})
	return data, err
}

// with calls f with the TPM and the parent key of sealed data, and leaves nothing in the TPM. The
// parameters that f sends are encrypted for that key.
func (p *TPM) with(what string, f func(t transport.TPM, parent *tpm2.CreatePrimaryResponse, salted tpm2.AuthOption) error) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	err := func() error {
		t, err := p.dial()
		if err != nil {
			return err
		}
		defer t.Close()
		parent, err := tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHOwner, InPublic: tpm2.New2B(tpm2.ECCSRKTemplate)}.Execute(t)
		if err != nil {
			return err
		}
		defer tpm2.FlushContext{FlushHandle: parent.ObjectHandle}.Execute(t)
		public, err := parent.OutPublic.Contents()
		if err != nil {
			return err
		}
		return f(t, parent, tpm2.Salted(parent.ObjectHandle, *public))
	}()
	if err != nil {
		return fmt.Errorf("%s with the TPM: %w", what, err)
	}
	return nil
}

func (p *TPM) dial() (transport.TPMCloser, error) {
	switch {
	case p.Path == "":
		return linuxtpm.Open(Device)
	case strings.HasPrefix(p.Path, "/dev/"):
		return linuxtpm.Open(p.Path)
	}
	return linuxudstpm.Open(p.Path)
}

// policyNow returns the digest of the policy for the present value of PCR 7.
func policyNow(t transport.TPM) (d tpm2.TPM2BDigest, err error) {
	session, end, err := tpm2.PolicySession(t, tpm2.TPMAlgSHA256, 16, tpm2.Trial())
	if err != nil {
		return d, err
	}
	defer end()
	if _, err := (tpm2.PolicyPCR{PolicySession: session.Handle(), Pcrs: pcr7}).Execute(t); err != nil {
		return d, err
	}
	got, err := tpm2.PolicyGetDigest{PolicySession: session.Handle()}.Execute(t)
	if err != nil {
		return d, err
	}
	return got.PolicyDigest, nil
}
