package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"text/tabwriter"
	"time"

	"github.com/sluice-edge/sluice/auth"
	"github.com/sluice-edge/sluice/internal/config"
	"github.com/sluice-edge/sluice/internal/daemon"
)

// keyTimeout bounds one call of the key command; Redis is near or it is wrong.
const keyTimeout = 10 * time.Second

// runKey is `sluice key create|ls|rm`. Keys live in Redis as hashes: a key is shown once, when it is made.
func runKey(ctx context.Context, args []string) error {
	const verbs = "create, ls or rm"
	if len(args) == 0 {
		return fmt.Errorf("key: say what to do: %s", verbs)
	}
	verb, args := args[0], args[1:]
	if verb == "-h" || verb == "-help" || verb == "--help" {
		fmt.Printf("usage: sluice key VERB [flags]   (VERB is %s; sluice key VERB -h lists the flags)\n", verbs)
		return config.ErrHelp
	}
	fs := flag.NewFlagSet("sluice key "+verb, flag.ContinueOnError)
	redisURL := fs.String("redis", "redis://127.0.0.1:6379", "`URL` of the Redis that holds keys")
	name, team, id := new(string), new(string), new(string)
	switch verb {
	case "create":
		fs.StringVar(name, "name", "", "what the key is for, shown by ls")
		fs.StringVar(team, "team", "default", "whose sandboxes the key sees")
	case "rm":
		fs.StringVar(id, "id", "", "`id` of the key, as shown by ls")
	case "ls":
	default:
		return fmt.Errorf("key: no verb %q, want %s", verb, verbs)
	}
	if err := config.Parse(fs, args, os.Getenv, os.Stdout); err != nil {
		return err
	}
	client, err := daemon.OpenRedis(*redisURL)
	if err != nil {
		return err
	}
	defer client.Close()
	keys := auth.NewRedisKeys(client)
	ctx, cancel := context.WithTimeout(ctx, keyTimeout)
	defer cancel()
	switch verb {
	case "create":
		key, record := auth.NewKeyRecord(*name, *team)
		if err := keys.PutKey(ctx, record); err != nil {
			return err
		}
		fmt.Println(key)
		return nil
	case "rm":
		if *id == "" {
			return errors.New("key rm: -id is missing: `sluice key ls` shows the ids")
		}
		return keys.DeleteKey(ctx, *id)
	}
	records, err := keys.Keys(ctx)
	if err != nil {
		return err
	}
	table := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "ID\tTEAM\tNAME\tCREATED")
	for _, r := range records {
		fmt.Fprintf(table, "%s\t%s\t%s\t%s\n", r.ID, r.Team, r.Name, r.Created.Format(time.RFC3339))
	}
	return table.Flush()
}
