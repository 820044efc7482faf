package metrics

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/test/lab"
)

const rsyslog = `module(load="imtcp" maxSessions="8")
input(type="imtcp" port="514")
template(name="line" type="string" string="%%hostname%%|%%app-name%%|%%msgid%%|%%syslogfacility-text%%.%%syslogseverity-text%%|%%structured-data%%|%%msg%%\n")
action(type="omfile" file="%s" template="line")
`

// TestExport has rsyslog and a webhook receive the events of a node. While rsyslog is gone, the
// node says so; when it is back it gets what it missed.
func TestExport(t *testing.T) {
	w := begin(t)
	out, conf := filepath.Join(w.dir, "events.log"), filepath.Join(w.dir, "rsyslog.conf")
	w.ok(os.WriteFile(conf, []byte(fmt.Sprintf(rsyslog, out)), 0o600))
	// A copy is not confined to the files of /var/log, as AppArmor does with the original.
	program, err := os.ReadFile("/usr/sbin/rsyslogd")
	w.ok(err)
	w.ok(os.WriteFile(filepath.Join(w.dir, "rsyslogd"), program, 0o700))
	start := func() *lab.Process {
		p, err := w.monitor.Start("rsyslogd", filepath.Join(w.dir, "rsyslogd"), "-n", "-f", conf, "-i", filepath.Join(w.dir, "rsyslogd.pid"))
		w.ok(err)
		return p
	}
	received := func(text string) {
		t.Helper()
		w.ok(lab.Until(t.Context(), time.Minute, func() error {
			data, err := os.ReadFile(out)
			if err == nil && !strings.Contains(string(data), text) {
				err = fmt.Errorf("no %q in\n%s", text, data)
			}
			return err
		}))
	}
	status := func(named bool) {
		t.Helper()
		w.ok(lab.Until(t.Context(), time.Minute, func() error {
			s, err := w.hub.CLI(t.Context(), "", "status")
			if err == nil && strings.Contains(s, "EventExportFailing") != named {
				err = errors.New("the status is " + s)
			}
			return err
		}))
	}
	set := func(name string) {
		t.Helper()
		_, err := w.hub.CLI(t.Context(), "0123456789abcdef", "secret", "set", name)
		w.ok(err)
	}
	var mu sync.Mutex
	var objects []string
	listener, err := w.monitor.Listen("tcp", "192.0.2.1:8080")
	w.ok(err)
	hook := &http.Server{ReadHeaderTimeout: time.Minute, Handler: http.HandlerFunc(func(_ http.ResponseWriter, q *http.Request) {
		var body struct{ Events []struct{ Object string } }
		data, _ := io.ReadAll(q.Body)
		if err := json.Unmarshal(data, &body); err != nil || q.Header.Get("Isthmus-Signature") == "" {
			t.Errorf("%v: %v, %s", err, q.Header, data)
		}
		mu.Lock()
		defer mu.Unlock()
		for _, e := range body.Events {
			objects = append(objects, e.Object)
		}
	})}
	go func() { _ = hook.Serve(listener) }()
	defer hook.Close()

	receiver := start()
	set("hook-key")
	document, err := w.hub.CLI(t.Context(), "", "get", "spec")
	w.ok(err)
	w.hub.Apply(t, document+`events:
  export:
  - {name: siem, syslog: "192.0.2.1:514"}
  - {name: hook, webhook: "http://192.0.2.1:8080/", secret: hook-key}
`)
	set("first")
	received(`node-0|isthmus|SecretSet|local0.info|[isthmus@32473 log="`)
	received(`object="secret/first" who="root`)
	receiver.Signal(unix.SIGKILL)
	<-receiver.Done()
	set("second")
	status(true)
	start()
	received(`object="secret/second"`)
	status(false)
	received(`ConditionEnded`)
	w.ok(lab.Until(t.Context(), time.Minute, func() error {
		mu.Lock()
		defer mu.Unlock()
		if text := strings.Join(objects, " "); !strings.Contains(text, "secret/first") || !strings.Contains(text, "secret/second") {
			return errors.New("the webhook has " + text)
		}
		return nil
	}))

	// The metadata service is refused as a receiver.
	_, err = w.hub.CLI(t.Context(), document+"events: {export: [{name: x, webhook: \"http://169.254.169.254/latest\"}]}\n", "apply", "-f", "-")
	if err == nil || !strings.Contains(err.Error(), "events.export[0].webhook") || !strings.Contains(err.Error(), "is a service of the cloud for the machine") {
		t.Errorf("the metadata service as a receiver: %v", err)
	}
}
