package firstboot

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// Ring: pure.

func request(t *testing.T, name string, key any) string {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: name}}, key)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}))
}

func elliptical(t *testing.T, curve elliptic.Curve) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(curve, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func block(text string) string {
	return "|\n    " + strings.ReplaceAll(strings.TrimSpace(text), "\n", "\n    ") + "\n"
}

func TestForeign(t *testing.T) {
	for text, want := range map[string]string{
		"": "nothing", "\n \n": "nothing", "#isthmus\n": "", "#isthmus\r\nhosts: []": "", "#isthmus": "", "isthmus: 1\nhosts: [a]\n": "", `{"isthmus": 1}`: "text of another kind",
		"# comment\nisthmus: 1\n": "", "#!/bin/sh\nisthmus: 1\n": "a script", "#cloud-config\nusers: []\n": "a cloud-config", "\x1f\x8b\x08": "compressed data",
		"Content-Type: multipart/mixed\n\n": "a MIME message", "MIME-Version: 1.0\n": "a MIME message", "#isthmuses\n": "text of another kind", "hello": "text of another kind",
		" #isthmus\n": "text of another kind",
	} {
		if got := Foreign([]byte(text)); got != want {
			t.Errorf("%q is %q, want %q", text, got, want)
		}
	}
}

func TestParse(t *testing.T) {
	csr := request(t, "alice", elliptical(t, elliptic.P256()))
	const sum = "E3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
	u, problems := Parse([]byte("#isthmus\ndocumentURL: https://example.com/hub-1.yaml?x=y\ndocumentSHA256: " + sum + "\naccess: {api: [203.0.113.128/28]}\nadmin:\n  lifetime: 24h\n  request: " + block(csr) +
		"hosts: [hub.example, 203.0.113.9, \"2001:db8::1\"]\nconsole: shell\nreportReady: false\n"))
	if len(problems) > 0 {
		t.Fatal(problems)
	}
	if u.SHA256 != strings.ToLower(sum) || u.Admin.Name != "alice" || u.Admin.Lifetime != 24*time.Hour || len(u.API) != 1 || len(u.Hosts) != 3 || !u.Shell || !u.Quiet || len(u.Digest) != 64 {
		t.Errorf("%+v", u)
	}
	if u, problems := Parse([]byte("#isthmus\nhosts: []\n")); len(problems) > 0 || u.Admin != nil || u.Shell || u.Quiet {
		t.Errorf("empty: %+v, %v", u, problems)
	}
	small, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if _, problems := Parse([]byte("isthmus: 1\nadmin:\n  name: bob@example.com\n  request: " + block(request(t, "", ed)))); len(problems) > 0 {
		t.Errorf("Ed25519: %v", problems)
	}
	tampered := []byte(csr)
	der, _ := pem.Decode(tampered)
	der.Bytes[len(der.Bytes)-1] ^= 1
	for text, wants := range map[string][]string{
		"#isthmus\n":                          {"is empty; write at least"},
		"isthmus: 2\n":                        {`isthmus: "2" is not a version`},
		"#isthmus\nisthmus: 0\n":              {`isthmus: "0" is not a version`},
		"#isthmus\nnope: 1\n":                 {"nope: is an unknown field"},
		"#isthmus\n- a\n":                     {"must be a group of fields"},
		"#isthmus\nhosts: [a\n":               {"is not valid YAML"},
		"#isthmus\ndocument: a\nhosts: [b]\n": nil,
		"#isthmus\ndocument: a\ndocumentURL: https://x/y\ndocumentSHA256: " + sum + "\n":         {"documentURL: conflicts with `document`"},
		"#isthmus\ndocumentURL: https://x/y\n":                                                   {"documentSHA256: is required"},
		"#isthmus\ndocumentSHA256: " + sum + "\n":                                                {"documentURL: is required"},
		"#isthmus\ndocumentURL: file:///etc/shadow\ndocumentSHA256: zz\n":                        {"documentURL: is not a URL", `documentSHA256: "zz" is not a SHA-256`},
		"#isthmus\ndocumentURL: https://me:word@x/y\ndocumentSHA256: " + sum + "\n":              {"documentURL: is not a URL"},
		"#isthmus\naccess: {api: [10.0.0.1/8, x]}\nconsole: root\nhosts: [\"a b\", \"ä\"]\n":     {"access.api[0]", "access.api[1]", `console: "root"`, "hosts[0]", "hosts[1]"},
		"#isthmus\nhosts: [" + strings.Repeat("a, ", 17) + "]\n":                                 {"hosts: has more than 16"},
		"#isthmus\nadmin: {name: x}\n":                                                           {"admin.request: is required"},
		"#isthmus\nadmin: {request: x}\n":                                                        {"admin.request: is not one certificate request"},
		"#isthmus\nadmin:\n  request: " + block(csr+csr):                                         {"admin.request: is not one certificate request"},
		"#isthmus\nadmin:\n  request: " + block(string(pem.EncodeToMemory(der))):                 {"admin: cannot be signed"},
		"#isthmus\nadmin:\n  request: " + block(request(t, "", ed)):                              {"admin: cannot be signed", "name"},
		"#isthmus\nadmin:\n  request: " + block(request(t, "root", ed)):                          {"admin: cannot be signed", "reserved"},
		"#isthmus\nadmin:\n  request: " + block(request(t, "first boot", ed)):                    {"admin: cannot be signed", "name"},
		"#isthmus\nadmin:\n  request: " + block(request(t, "a", small)):                          {"admin: cannot be signed", "key must be"},
		"#isthmus\nadmin:\n  request: " + block(request(t, "a", elliptical(t, elliptic.P224()))): {"admin: cannot be signed", "key must be"},
		"#isthmus\nadmin:\n  lifetime: 100000h\n  request: " + block(csr):                        {"admin: cannot be signed", "lifetime"},
	} {
		_, problems := Parse([]byte(text))
		if wants == nil && len(problems) > 0 {
			t.Errorf("%.60q: %v", text, problems)
		}
		for _, want := range wants {
			if !strings.Contains(fmt.Sprint(problems), want) {
				t.Errorf("%.60q: %v; want %q", text, problems, want)
			}
		}
	}
	// The most expensive text within 64 KiB ends soon.
	begin := time.Now()
	_, problems = Parse([]byte("#isthmus\naccess: {api: [" + strings.Repeat("x,", 32000) + "]}\n"))
	if len(problems) == 0 || len(problems) > 101 || time.Since(begin) > 10*time.Second {
		t.Errorf("%d problems after %v", len(problems), time.Since(begin))
	}
}

// TestShowAtOnce has several goroutines write the console's text, as the readers of facts and of
// user-data do.
func TestShowAtOnce(t *testing.T) {
	dir := t.TempDir()
	var log strings.Builder
	b := &Boot{o: Options{Console: filepath.Join(dir, "console"), Runtime: dir, Log: slog.New(slog.NewTextHandler(&log, nil))}}
	var writers sync.WaitGroup
	for i := range 4 {
		writers.Go(func() {
			for range 50 {
				b.note(strings.Repeat(strconv.Itoa(i), 1000+i))
			}
		})
	}
	writers.Wait()
	b.note("the last")
	if data, err := os.ReadFile(b.o.Console); err != nil || string(data) != "isthmus: the last\n" || log.Len() > 0 {
		t.Errorf("%q, %v; the log has %.300s", data, err, log.String())
	}
}

func TestReplace(t *testing.T) {
	name := filepath.Join(t.TempDir(), "console")
	for _, text := range []string{"one\n", "two\n"} {
		if err := replace(name, []byte(text)); err != nil {
			t.Fatal(err)
		}
		data, err := os.ReadFile(name)
		info, _ := os.Stat(name)
		if err != nil || string(data) != text || info.Mode() != 0o644 {
			t.Errorf("%q, %v, %v", data, err, info.Mode())
		}
	}
	before, _ := os.Stat(name)
	if err := replace(name, []byte("two\n")); err != nil {
		t.Fatal(err)
	}
	if after, _ := os.Stat(name); !os.SameFile(before, after) {
		t.Error("the same text was written again")
	}
	left, _ := filepath.Glob(filepath.Join(filepath.Dir(name), "*"))
	if !slices.Equal(left, []string{name}) {
		t.Errorf("left over: %v", left)
	}
	if got := plain("a\x1b[2J\tä\n"); got != "a?[2J??\n" {
		t.Errorf("%q", got)
	}
}
