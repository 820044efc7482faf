// Command make writes a state directory with one file of each kind, in the format of the version
// that it is built in. Its output of revision 36b3eab is in ../36b3eab, made by
//
//	git archive 36b3eab | tar -x -C DIR && mkdir DIR/cmd/make &&
//	cp router/store/testdata/make/main.go DIR/cmd/make && (cd DIR && go run ./cmd/make OUT)
//
// The file "lock" of the output is left out. Keys and secrets in it were made for this and protect
// nothing.
package main

import (
	"encoding/json"
	"fmt"
	"io"
	"log"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/isthmus-net/isthmus/router/auth"
	"github.com/isthmus-net/isthmus/router/store"
)

func main() {
	log.SetFlags(0)
	if len(os.Args) != 2 {
		log.Fatal("usage: make DIR")
	}
	if err := write(os.Args[1]); err != nil {
		log.Fatal(err)
	}
}

func write(dir string) error {
	now := time.Date(2026, 1, 15, 12, 0, 0, 0, time.UTC)
	st, err := store.Open(dir)
	if err != nil {
		return err
	}
	defer st.Close()
	audit, err := auth.OpenAudit(filepath.Join(dir, "audit.log"), func() time.Time { return now })
	if err != nil {
		return err
	}
	defer audit.Close()
	// The authority and the first admin.
	a, err := auth.New(auth.Options{Store: st, Address: "192.0.2.1:7443", Bundle: filepath.Join(dir, "admin.yaml"), Notice: io.Discard, Audit: audit, Now: func() time.Time { return now }})
	if err != nil {
		return err
	}
	if _, err := a.Renew(false); err != nil { // two authorities, during an overlap
		return err
	}
	for i, name := range []string{"ann", "bob"} {
		c := store.Client{Serial: fmt.Sprintf("4%031x", i), Name: name, Role: "reader", Issued: now, Expires: now.AddDate(1, 0, 0), Revoked: name == "bob"}
		if err := st.SetClient(c); err != nil {
			return err
		}
	}
	for _, value := range []string{"first", "second"} { // with the former value
		if _, err := st.SetSecret("aws-0", []byte(value), now); err != nil {
			return err
		}
	}
	// A full text, deltas of it, and one that waits for its confirmation.
	text := "tunnels: [{name: a}]\n" + strings.Repeat("# a document that is long enough for its changes to be written alone\n", 40)
	ledger := json.RawMessage(`{"tunnels":{"a":{"id":490001,"interface":"t-a"}}}`)
	for i, t := range []string{text, text + "# more\n", text + "# more and more\n"} {
		r := store.Revision{Time: now, Author: "ann", Reason: "apply", Changes: uint32(i), Text: t, Ledger: ledger}
		if i == 2 {
			r.ConfirmBy, r.RevertTo = now.Add(time.Hour), 2
		}
		if _, err := st.Accept(uint64(i), r); err != nil {
			return err
		}
	}
	return st.SetCarry(store.Carry{Carried: 2, Trying: 3, Starts: 1, Back: true})
}
