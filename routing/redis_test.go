package routing_test

import (
	"testing"

	"github.com/sluice-edge/sluice/routing"
	"github.com/sluice-edge/sluice/routing/routingtest"
)

func TestMemoryStore(t *testing.T) {
	routingtest.Run(t, func(*testing.T) routing.Store { return routing.NewMemoryStore() })
}

func TestRedisStore(t *testing.T) {
	server := routingtest.StartRedis(t)
	routingtest.Run(t, func(t *testing.T) routing.Store { return emptyStore(t, server) })
}

func TestRedisStoreOnACluster(t *testing.T) {
	server := routingtest.StartCluster(t)
	routingtest.Run(t, func(t *testing.T) routing.Store { return emptyStore(t, server) })
}

func emptyStore(t *testing.T, server *routingtest.Redis) *routing.RedisStore {
	t.Helper()
	client := server.Client(t)
	if err := client.FlushAll(t.Context()).Err(); err != nil {
		t.Fatal(err)
	}
	return routing.NewRedisStore(client, routing.RedisOptions{})
}
