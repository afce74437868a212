package guest

import "testing"

func TestChooseCoding(t *testing.T) {
	check := func(accept string, want coding) {
		t.Helper()
		if got := chooseCoding(accept, true); got != want {
			t.Errorf("chooseCoding(%q) = %d, want %d", accept, got, want)
		}
	}
	if got := chooseCoding("", false); got != codingIdentity {
		t.Errorf("without the header: %d", got)
	}
	check("", codingIdentity)
	check("gzip, deflate", codingGzip)
	check("zstd,gzip,br", codingGzip)
	check("GZIP", codingGzip)
	check("x-gzip", codingGzip)
	check("*", codingGzip)
	check("br", codingIdentity)
	check("gzip;q=0", codingIdentity)
	check("gzip;q=0.5, identity", codingIdentity)
	check("gzip;q=0.5, identity;q=0.1", codingGzip)
	check("gzip ; q=0.000", codingIdentity)
	check("identity;q=0", codingNone)
	check("identity;q=0, br", codingNone)
	check("*;q=0", codingNone)
	check("*;q=0, identity", codingIdentity)
	check("*;q=0, gzip", codingGzip)
	check("gzip;q=0, identity;q=0", codingNone)
	check("gzip;q=nan, identity;q=2", codingNone)
}

func FuzzChooseCoding(f *testing.F) {
	f.Add("gzip;q=0.5, identity;q=0")
	f.Add("*;q=0,;;;q=,")
	f.Fuzz(func(t *testing.T, accept string) {
		// Saying more clearly that identity is welcome can never end in a refusal.
		if got := chooseCoding(accept+",identity;q=1", true); got == codingNone {
			t.Errorf("chooseCoding(%q) refuses", accept)
		}
	})
}
