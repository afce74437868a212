package auth

import (
	"crypto/sha256"
	"encoding/json"
	"reflect"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/sluice-edge/sluice/internal/errs"
)

var keyForm = regexp.MustCompile(`\Ae2b_[0-9a-f]{40}\z`)

func TestNewKeyRecord(t *testing.T) {
	key, r := NewKeyRecord("laptop", "team")
	if !keyForm.MatchString(key) {
		t.Errorf("key %q has not the form that SDKs check", key)
	}
	if hash, ok := HashKey([]byte(key)); !ok || hash != r.Hash {
		t.Errorf("HashKey() = %x, %v, want the hash of the record", hash, ok)
	}
	if strings.Contains(key, r.ID) || len(r.ID) != 12 || r.Name != "laptop" || r.Team != "team" || time.Since(r.Created) > time.Hour {
		t.Errorf("record = %+v", r)
	}
	if other := NewAPIKey(); other == key {
		t.Error("two keys are the same")
	}
}

func TestKeyRecordRefusesWhatItCannotMean(t *testing.T) {
	_, good := NewKeyRecord("n", "team")
	text, err := json.Marshal(good)
	if err != nil {
		t.Fatal(err)
	}
	var back KeyRecord
	if err := json.Unmarshal(text, &back); err != nil || !reflect.DeepEqual(back, good) {
		t.Fatalf("round trip = %+v, %v, want %+v", back, err, good)
	}
	for _, change := range [][2]string{
		{`"v":1`, `"v":2`},
		{`"v":1`, `"v":0`},
		{`"team":"team"`, `"team":""`},
		{`"id":"`, `"id":5,"x":"`},
		{`"hash":"`, `"hash":"0`},
		{`"hash":"`, `"hash":"zz`},
	} {
		bad := strings.Replace(string(text), change[0], change[1], 1)
		if err := json.Unmarshal([]byte(bad), &back); err == nil {
			t.Errorf("%s was read", bad)
		}
	}
	for what, r := range map[string]KeyRecord{
		"no id":   {Team: "t", Hash: good.Hash},
		"no team": {ID: "i", Hash: good.Hash},
		"no hash": {ID: "i", Team: "t"},
	} {
		if _, err := json.Marshal(r); errs.CodeOf(err) != errs.Internal && errs.CodeOf(err) != errs.Invalid || err == nil {
			t.Errorf("a record with %s was written", what)
		}
	}
}

func FuzzHashKey(f *testing.F) {
	for _, seed := range []string{
		"", "e2b_", NewAPIKey(), "e2b_" + strings.Repeat("A", 40), "E2B_" + strings.Repeat("a", 40), "e2b_" + strings.Repeat("a", 41),
		"e2b-" + strings.Repeat("a", 40), "e2b_" + strings.Repeat("g", 40), "sk_e2b_" + strings.Repeat("0", 37), "e2b_" + strings.Repeat("0", 39) + "\n",
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, key []byte) {
		hash, ok := HashKey(key)
		if ok != keyForm.Match(key) {
			t.Fatalf("HashKey(%q) accepts %v, the form says %v", key, ok, !ok)
		}
		if ok && hash != sha256.Sum256(key) || !ok && hash != (KeyHash{}) {
			t.Fatalf("HashKey(%q) = %x", key, hash)
		}
	})
}

func FuzzKeyRecord(f *testing.F) {
	_, r := NewKeyRecord("name", "team")
	text, err := json.Marshal(r)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(text)
	f.Add([]byte(`{"v":1,"id":"a","team":"t","created":"2026-01-01T00:00:00+25:00","hash":"` + strings.Repeat("ab", 32) + `"}`))
	f.Add([]byte(`{}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		var first, second KeyRecord
		if json.Unmarshal(data, &first) != nil {
			if !reflect.DeepEqual(first, KeyRecord{}) {
				t.Fatalf("%q was refused and yet changed the record", data)
			}
			return
		}
		text, err := json.Marshal(first)
		if err != nil {
			t.Fatalf("%q was read and cannot be written: %v", data, err)
		}
		if err := json.Unmarshal(text, &second); err != nil {
			t.Fatalf("%s was written and cannot be read: %v", text, err)
		}
		if !first.Created.Equal(second.Created) {
			t.Fatalf("created %v became %v", first.Created, second.Created)
		}
		first.Created, second.Created = time.Time{}, time.Time{}
		if first != second {
			t.Fatalf("%+v became %+v", first, second)
		}
	})
}
