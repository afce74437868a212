package auth

import "testing"

func BenchmarkTokenMatches(b *testing.B) {
	token := []byte(NewTokenKey([]byte("key")).Traffic(NewNonce()))
	hash := HashToken(token)
	for b.Loop() {
		TokenMatches(hash, token)
	}
}

func BenchmarkAuthorize(b *testing.B) {
	s := NewMemoryKeys()
	text, r := NewKeyRecord("bench", "team")
	if err := s.PutKey(b.Context(), r); err != nil {
		b.Fatal(err)
	}
	ring, key := NewKeyring(s, KeyringOptions{TTL: 1 << 62}), []byte(text)
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if _, err := ring.Authorize(b.Context(), key); err != nil {
				b.Error(err)
			}
		}
	})
}
