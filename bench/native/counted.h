/* What the readers in C share: when to end, and what is printed. */
#pragma once
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

struct tally {
    int64_t frames, bytes, sum;     /* sum: of the number that the sender wrote into each payload */
};

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

static int64_t clock_now(clockid_t clock)
{
    struct timespec now;
    clock_gettime(clock, &now);
    return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

static void say_ready(void)
{
    puts("ready");
    fflush(stdout);
}

/* CPU time of this process since `begun`, and what was counted. */
static void say_result(const struct tally *tally, int64_t begun, int64_t dropped)
{
    long long cpu = (long long)(clock_now(CLOCK_PROCESS_CPUTIME_ID) - begun);
    printf("%lld %lld %lld %lld %lld\n", (long long)tally->frames, (long long)tally->bytes, (long long)tally->sum,
           cpu, (long long)dropped);
}
