package platform

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// Ring: pure and fake; the servers are on the loopback.

func TestDetect(t *testing.T) {
	for what, c := range map[string]struct {
		dmi  DMI
		seed bool
		want Kind
	}{
		"Nitro":                    {DMI{SysVendor: "Amazon EC2", ProductName: "c6in.large", BIOSVendor: "Amazon EC2", ChassisAssetTag: "Amazon EC2"}, false, AWS},
		"bare metal of EC2":        {DMI{SysVendor: "Amazon EC2", ProductName: "m5.metal", BIOSVendor: "Amazon EC2"}, true, AWS},
		"Xen of EC2":               {DMI{SysVendor: "Xen", ProductName: "HVM domU", BIOSVendor: "Xen", BIOSVersion: "4.11.amazon"}, false, AWS},
		"Xen elsewhere":            {DMI{SysVendor: "Xen", ProductName: "HVM domU", BIOSVersion: "4.11.1"}, false, None},
		"Azure":                    {DMI{SysVendor: "Microsoft Corporation", ProductName: "Virtual Machine", ChassisAssetTag: "7783-7084-3265-9085-8269-3286-77"}, true, Azure},
		"Hyper-V":                  {DMI{SysVendor: "Microsoft Corporation", ProductName: "Virtual Machine", ChassisAssetTag: "2122-5141-5417-0513-6241-1742-16"}, false, None},
		"Google":                   {DMI{SysVendor: "Google", ProductName: "Google Compute Engine", BIOSVendor: "Google"}, false, Google},
		"a Chromebook":             {DMI{SysVendor: "Google", ProductName: "Eve", BIOSVendor: "coreboot"}, false, None},
		"QEMU":                     {DMI{SysVendor: "QEMU", ProductName: "Standard PC (Q35 + ICH9, 2009)"}, false, None},
		"QEMU with a seed":         {DMI{SysVendor: "QEMU", ProductName: "Standard PC (Q35 + ICH9, 2009)"}, true, NoCloud},
		"no DMI":                   {DMI{}, false, None},
		"a name that has the word": {DMI{SysVendor: "Not Amazon EC2", ProductName: "Google Compute Engine 2"}, false, None},
	} {
		if got := Detect(c.dmi, c.seed); got != c.want {
			t.Errorf("%s: %s, want %s", what, got, c.want)
		}
	}
}

func TestReadDMI(t *testing.T) {
	sys := t.TempDir()
	dir := filepath.Join(sys, "class/dmi/id")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string]string{"sys_vendor": "Amazon EC2\n", "product_name": strings.Repeat("x", 5000), "chassis_asset_tag": " tag \n"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if got, want := ReadDMI(sys), (DMI{SysVendor: "Amazon EC2", ProductName: strings.Repeat("x", maxDMI), ChassisAssetTag: "tag"}); got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
}

func TestFacts(t *testing.T) {
	a := netip.MustParseAddr
	with := func(address, public string) Address { return Address{Address: a(address), Public: a(public)} }
	alone := func(address string) Address { return Address{Address: a(address)} }
	p := func(list ...string) (out []netip.Prefix) {
		for _, s := range list {
			out = append(out, netip.MustParsePrefix(s))
		}
		return out
	}
	for k, want := range map[Kind]Facts{
		AWS: {Platform: AWS, Instance: "i-1234567890abcdef0", Region: "us-west-2", Zone: "us-west-2b", Type: "c6in.large", NICs: []NIC{
			{MAC: "0e:49:61:0f:c3:11", Addresses: []Address{with("10.158.112.84", "203.0.113.9"), alone("10.158.112.85"), with("10.158.112.86", "203.0.113.10"), alone("2001:db8:8:4::2")},
				Subnets: p("10.158.112.0/24", "2001:db8:8:4::/64"), Router: a("10.158.112.1")},
			{MAC: "02:29:96:8f:6a:2d", Addresses: []Address{alone("10.158.120.7")}, Subnets: p("10.158.120.0/24"), Router: a("10.158.120.1")},
		}},
		Azure: {Platform: Azure, Instance: "02aab8a4-74ef-476e-8182-f6d2ba4166a6", Region: "westeurope", Zone: "2", Type: "Standard_D4s_v5", NICs: []NIC{
			{MAC: "00:11:aa:ff:bb:22", Addresses: []Address{with("10.144.133.132", "203.0.113.11"), with("10.144.133.133", "203.0.113.12"), alone("2001:db8:8:5::4")},
				Subnets: p("10.144.133.128/26"), Router: a("10.144.133.129")},
		}},
		Google: {Platform: Google, Instance: "5555555555555555555", Region: "us-central1", Zone: "us-central1-a", Type: "n2-standard-2", NICs: []NIC{
			{MAC: "42:01:0a:80:00:0f", Addresses: []Address{with("10.128.0.15", "203.0.113.13"), alone("2001:db8:8:6::5"), alone("10.128.0.40")},
				Subnets: p("10.128.0.0/20"), Router: a("10.128.0.1"), MTU: 1460},
		}},
	} {
		f, r := newFake(t, k)
		got, err := r.Facts(t.Context())
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s: %v\n%+v, want\n%+v", k, err, got, want)
		}
		if i := slices.IndexFunc(f.asked, func(q string) bool {
			return strings.Contains(strings.ToLower(q), "user") || strings.Contains(q, "attributes")
		}); i >= 0 {
			t.Errorf("%s: facts were read with %s, which has the user-data", k, f.asked[i])
		}
		data, err := r.UserData(t.Context())
		if err != nil || string(data) != "#isthmus\nhosts: [hub.example]\n" {
			t.Errorf("%s: user-data %q, %v", k, data, err)
		}
		for path := range map[string]bool{"/latest/user-data": true, "/metadata/instance/compute/userData": true, "/computeMetadata/v1/instance/attributes/user-data": true} {
			f.answer(path, text(http.StatusNotFound, "text/html", "<html>404</html>"))
		}
		if data, err := r.UserData(t.Context()); err != nil || len(data) > 0 {
			t.Errorf("%s without user-data: %q, %v", k, data, err)
		}
	}
}

// TestAzureCustomData checks that customData counts when userData is missing.
func TestAzureCustomData(t *testing.T) {
	f, r := newFake(t, Azure)
	f.answer("/metadata/instance/compute/userData", text(200, "text/plain", ""))
	f.answer("/metadata/instance/compute/customData", text(200, "text/plain", "I2lzdGhtdXMK\n"))
	if data, err := r.UserData(t.Context()); err != nil || string(data) != "#isthmus\n" {
		t.Errorf("%q, %v", data, err)
	}
}

// TestHostile checks that an answer that is not the platform's, or that is made to be expensive,
// soon becomes an error that says what to do.
func TestHostile(t *testing.T) {
	stolen := make(chan string, 100)
	thief := http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		stolen <- q.URL.String()
		w.Header().Set("Metadata-Flavor", "Google")
		fmt.Fprint(w, "#isthmus\n")
	})
	f0 := &fake{over: map[string]http.HandlerFunc{"*": thief}}
	elsewhere := newServer(t, f0)
	t.Setenv("http_proxy", elsewhere)
	t.Setenv("HTTP_PROXY", elsewhere)
	const late = "no complete answer within"
	cases := map[string]struct {
		answer http.HandlerFunc
		says   string
	}{
		"redirect":       {func(w http.ResponseWriter, q *http.Request) { http.Redirect(w, q, elsewhere+"/x", http.StatusFound) }, "redirects"},
		"web page":       {text(200, "text/html; charset=utf-8", "please sign in"), "web page"},
		"web page plain": {text(200, "text/plain", "\n<!DOCTYPE html><html>"), "web page"},
		"oversized":      {text(200, "text/plain", strings.Repeat("x", 2*MaxUserData)), "larger than"},
		"without end": {func(w http.ResponseWriter, q *http.Request) {
			w.Header().Set("Metadata-Flavor", "Google")
			for {
				if _, err := w.Write(make([]byte, 4096)); err != nil {
					return
				}
			}
		}, "larger than"},
		"slow": {func(w http.ResponseWriter, q *http.Request) {
			w.Header().Set("Metadata-Flavor", "Google")
			for q.Context().Err() == nil {
				w.Write([]byte("x"))
				w.(http.Flusher).Flush()
				time.Sleep(20 * time.Millisecond)
			}
		}, late},
		"silent":        {func(w http.ResponseWriter, q *http.Request) { <-q.Context().Done() }, late},
		"refused":       {text(403, "text/plain", "no"), "refuses with status 403"},
		"out of order":  {text(500, "text/plain", "oops"), "status 500"},
		"large headers": {func(w http.ResponseWriter, q *http.Request) { w.Header().Set("X", strings.Repeat("x", 1<<20)) }, "headers exceeded"},
	}
	for _, k := range []Kind{AWS, Azure, Google} {
		for what, c := range cases {
			wait := time.Minute
			if c.says == late {
				wait = 500 * time.Millisecond
			}
			f, r := newImpatient(t, k, wait)
			f.answer("*", c.answer)
			data, err := r.UserData(t.Context())
			if err == nil || !strings.Contains(err.Error(), c.says) || len(data) > 0 {
				t.Errorf("%s, %s: %d bytes, %v; want an error with %q", k, what, len(data), err, c.says)
			}
			if facts, err := r.Facts(t.Context()); err == nil {
				t.Errorf("%s, %s: facts %+v", k, what, facts)
			}
		}
	}
	select {
	case u := <-stolen:
		t.Errorf("another server was queried: %s", u)
	default:
	}
}

// TestOneVersion checks that EC2's metadata service is not queried without a token, and that
// Google's answers count only with their header.
func TestOneVersion(t *testing.T) {
	f, r := newFake(t, AWS)
	f.answer("*", func(w http.ResponseWriter, q *http.Request) { // only version 1
		if q.Method != http.MethodGet {
			w.WriteHeader(http.StatusNotFound)
			return
		}
		fmt.Fprint(w, "#isthmus\n")
	})
	if data, err := r.UserData(t.Context()); err == nil || !strings.Contains(err.Error(), "IMDSv2") || data != nil {
		t.Errorf("%q, %v", data, err)
	}
	if _, err := r.Facts(t.Context()); err == nil {
		t.Error("facts without a token")
	}
	for _, q := range f.asked {
		if q != "PUT /latest/api/token" {
			t.Errorf("request for %s without a token", q)
		}
	}
	f, r = newFake(t, Google)
	f.answer("*", func(w http.ResponseWriter, q *http.Request) { fmt.Fprint(w, "1") })
	if data, err := r.UserData(t.Context()); err == nil || !strings.Contains(err.Error(), "lacks the header") {
		t.Errorf("%q, %v", data, err)
	}
}

// TestWrongFacts checks that a value that is not as documented fails as a whole, and is not used in
// part.
func TestWrongFacts(t *testing.T) {
	const macs = "/latest/meta-data/network/interfaces/macs/"
	const google = "/computeMetadata/v1/instance/"
	for _, c := range []struct {
		kind             Kind
		path, body, says string
	}{
		{AWS, "/latest/api/token", "a b", "not a token"},
		{AWS, "/latest/api/token", "a\r\nX-Evil: b", "not one line"},
		{AWS, "/latest/dynamic/instance-identity/document", "[]", "not the JSON"},
		{AWS, "/latest/dynamic/instance-identity/document", `{"instanceId": 7}`, "not the JSON"},
		{AWS, "/latest/dynamic/instance-identity/document", `{}`, "not the id of an instance"},
		{AWS, macs, "../../../etc/", "not a hardware address"},
		{AWS, macs, strings.Repeat("0e:49:61:0f:c3:11/\n", 100), "more than 32 lines"},
		{AWS, macs + "0e:49:61:0f:c3:11/local-ipv4s", "0.0.0.0", "not an address of a machine"},
		{AWS, macs + "0e:49:61:0f:c3:11/ipv4-associations/", "10.0.0.1", "not a public address"},
		{AWS, macs + "0e:49:61:0f:c3:11/subnet-ipv4-cidr-block", "10.0.0.0", "not a prefix"},
		{Azure, "/metadata/instance/compute/vmId", "x", "not the id of a machine"},
		{Azure, "/metadata/instance/network", `{"interface": {}}`, "not the JSON"},
		{Azure, "/metadata/instance/network", `{"interface": [{"macAddress": "zz"}]}`, "not a hardware address"},
		{Azure, "/metadata/loadbalancer", `{"loadbalancer": {"publicIpAddresses": [{"frontendIpAddress": "x", "privateIpAddress": "10.0.0.1"}]}}`, "not an address"},
		{Google, google + "id", "abc", "not a number"},
		{Google, google + "network-interfaces/", `[{"mac": "42:01:0a:80:00:0f", "ip": "10.0.0.1", "mtu": 9}]`, "not an MTU"},
		{Google, google + "network-interfaces/", `[{"mac": "42:01:0a:80:00:0f", "ip": "127.0.0.1"}]`, "not an address"},
	} {
		f, r := newFake(t, c.kind)
		f.answer(c.path, text(200, "text/plain", c.body))
		got, err := r.Facts(t.Context())
		if err == nil || !strings.Contains(err.Error(), c.says) || got.Instance != "" {
			t.Errorf("%s %s %.40q: %+v, %v; want an error with %q", c.kind, c.path, c.body, got, err, c.says)
		}
		if err != nil && len(err.Error()) > 400 {
			t.Errorf("%s %s: an error of %d bytes", c.kind, c.path, len(err.Error()))
		}
	}
}

func TestReportReady(t *testing.T) {
	f, r := newFake(t, Azure)
	var reports []health
	f.wire(t, &reports)
	if err := r.(Provisioner).ReportReady(t.Context()); err != nil {
		t.Fatal(err)
	}
	if len(reports) != 1 || reports[0].Incarnation != "7" || reports[0].ContainerID != "c6d5526c-5ac2-4200-b6e2-56f2b70c5ab2" || reports[0].InstanceID != "_hub-1" || reports[0].State != "Ready" {
		t.Errorf("%+v", reports)
	}
	f.answer("/machine/", text(200, "text/xml", "<GoalState/>"))
	if err := r.(Provisioner).ReportReady(t.Context()); err == nil || len(reports) != 1 {
		t.Errorf("an empty goal state: %v", err)
	}
}

func TestNoCloud(t *testing.T) {
	dir := t.TempDir()
	if HasSeed(dir) || HasSeed("") {
		t.Error("an empty directory has a seed")
	}
	r, err := Open(NoCloud, Options{Seed: dir})
	if err != nil {
		t.Fatal(err)
	}
	write := func(name, text string) {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := r.UserData(t.Context()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no seed: %v", err)
	}
	write("user-data", "#isthmus\n")
	write("meta-data", "local-hostname: hub\ninstance-id: \"hub-1\"\n")
	if data, err := r.UserData(t.Context()); err != nil || string(data) != "#isthmus\n" || !HasSeed(dir) {
		t.Errorf("%q, %v", data, err)
	}
	if f, err := r.Facts(t.Context()); err != nil || f.Instance != "hub-1" || f.Platform != NoCloud {
		t.Errorf("%+v, %v", f, err)
	}
	write("user-data", strings.Repeat("x", MaxUserData+1))
	if _, err := r.UserData(t.Context()); err == nil || !strings.Contains(err.Error(), "larger than") || !errors.Is(err, ErrPermanent) {
		t.Errorf("oversized: %v", err)
	}
	if runtime.GOOS == "windows" {
		return // there, a link needs a privilege
	}
	if err := errors.Join(os.Remove(filepath.Join(dir, "user-data")), os.Symlink("/etc/shadow", filepath.Join(dir, "user-data"))); err != nil {
		t.Fatal(err)
	}
	if data, err := r.UserData(t.Context()); err == nil || HasSeed(dir) {
		t.Errorf("a link: %d bytes", len(data))
	}
}

// TestKeep checks that a failure is retried with longer and longer pauses until the deadline, and
// that ErrPermanent is not.
func TestKeep(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var asked, failed atomic.Int32
		begin := time.Now()
		err := Keep(t.Context(), func(context.Context) error {
			if asked.Add(1) < 6 {
				return errors.New("not yet")
			}
			return nil
		}, func(error) { failed.Add(1) })
		if d := time.Since(begin); err != nil || failed.Load() != 5 || d != 15500*time.Millisecond {
			t.Errorf("%v after %v, %d failures", err, d, failed.Load())
		}
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
		defer cancel()
		asked.Store(0)
		err = Keep(ctx, func(context.Context) error { asked.Add(1); return errors.New("never") }, func(error) {})
		if err == nil || err.Error() != "never" || asked.Load() > 60 || asked.Load() < 30 {
			t.Errorf("%v after %d attempts", err, asked.Load())
		}
		asked.Store(0)
		err = Keep(t.Context(), func(context.Context) error { asked.Add(1); return ErrPermanent }, func(error) {})
		if !errors.Is(err, ErrPermanent) || asked.Load() != 1 {
			t.Errorf("%v after %d attempts", err, asked.Load())
		}
	})
}

func TestOpenRefuses(t *testing.T) {
	for _, base := range []string{"https://169.254.169.254", "http://metadata.google.internal", "http://169.254.169.254/x", "169.254.169.254"} {
		if _, err := Open(AWS, Options{Metadata: base}); err == nil {
			t.Errorf("%s: no error", base)
		}
	}
	if _, err := Open(None, Options{}); err == nil {
		t.Error("none has a reader")
	}
}
