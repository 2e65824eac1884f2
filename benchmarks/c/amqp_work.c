/* The same rows as _amqp_work.py over rabbitmq-c: what a client in C spends.
 *
 * Usage: amqp_work HOST PORT; orders and answers are lines of JSON, of which only
 * "row", "count", "size", "queue", "prefetch" and "tasks" are read.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/time.h>
#include <amqp.h>
#include <amqp_tcp_socket.h>

static amqp_connection_state_t connection;

static void check(int good, const char *what) {
    if (!good) {
        fprintf(stderr, "amqp_work: %s failed\n", what);
        exit(1);
    }
}

static int answered(void) {
    return amqp_get_rpc_reply(connection).reply_type == AMQP_RESPONSE_NORMAL;
}

static double cpu(void) {
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return usage.ru_utime.tv_sec + usage.ru_stime.tv_sec +
           (usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) / 1e6;
}

static double wall(void) {
    struct timeval now;
    gettimeofday(&now, NULL);
    return now.tv_sec + now.tv_usec / 1e6;
}

/* The number behind "name": in an order. */
static long number_in(const char *order, const char *name, long otherwise) {
    char key[32];
    snprintf(key, sizeof key, "\"%s\": ", name);
    const char *at = strstr(order, key);
    return at ? atol(at + strlen(key)) : otherwise;
}

static void text_in(const char *order, const char *name, char *into, size_t size) {
    char key[32];
    snprintf(key, sizeof key, "\"%s\": \"", name);
    const char *at = strstr(order, key);
    into[0] = 0;
    if (at) {
        at += strlen(key);
        size_t length = strcspn(at, "\"");
        if (length >= size) length = size - 1;
        memcpy(into, at, length);
        into[length] = 0;
    }
}

static void publish(amqp_channel_t channel, long size) {
    static char body[65536];
    amqp_bytes_t bytes = {(size_t)size, body};
    amqp_basic_properties_t properties;
    memset(&properties, 0, sizeof properties);
    properties._flags = AMQP_BASIC_CONTENT_TYPE_FLAG | AMQP_BASIC_CONTENT_ENCODING_FLAG |
                        AMQP_BASIC_DELIVERY_MODE_FLAG | AMQP_BASIC_PRIORITY_FLAG |
                        AMQP_BASIC_HEADERS_FLAG;
    properties.content_type = amqp_cstring_bytes("application/data");
    properties.content_encoding = amqp_cstring_bytes("binary");
    properties.delivery_mode = 2;
    check(amqp_basic_publish(connection, channel, amqp_cstring_bytes("bench-nowhere"),
                             amqp_cstring_bytes("bench"), 0, 0, &properties, bytes) ==
              AMQP_STATUS_OK, "publish");
}

/* Wait for confirms until number `until` is confirmed. */
static void confirmed(uint64_t until) {
    static uint64_t last;
    while (last < until) {
        amqp_frame_t frame;
        amqp_maybe_release_buffers(connection);
        check(amqp_simple_wait_frame(connection, &frame) == AMQP_STATUS_OK, "wait for confirm");
        if (frame.frame_type == AMQP_FRAME_METHOD &&
            frame.payload.method.id == AMQP_BASIC_ACK_METHOD) {
            amqp_basic_ack_t *ack = frame.payload.method.decoded;
            if (ack->delivery_tag > last) last = ack->delivery_tag;
        }
    }
}

static void consume(const char *queue, long count, long prefetch) {
    if (prefetch) {
        amqp_basic_qos(connection, 1, 0, (uint16_t)prefetch, 0);
        check(answered(), "qos");
    }
    amqp_basic_consume(connection, 1, amqp_cstring_bytes(queue), amqp_cstring_bytes("c"), 0,
                       !prefetch, 0, amqp_empty_table);
    check(answered(), "consume");
    for (long seen = 0; seen < count; seen++) {
        amqp_envelope_t envelope;
        amqp_maybe_release_buffers(connection);
        amqp_rpc_reply_t reply = amqp_consume_message(connection, &envelope, NULL, 0);
        check(reply.reply_type == AMQP_RESPONSE_NORMAL, "consume_message");
        if (prefetch)
            check(!amqp_basic_ack(connection, 1, envelope.delivery_tag, 0), "ack");
        amqp_destroy_envelope(&envelope);
    }
    amqp_basic_cancel(connection, 1, amqp_cstring_bytes("c"));
    amqp_maybe_release_buffers(connection);
}

int main(int argc, char **argv) {
    check(argc == 3, "usage");
    connection = amqp_new_connection();
    amqp_socket_t *socket = amqp_tcp_socket_new(connection);
    check(socket && !amqp_socket_open(socket, argv[1], atoi(argv[2])), "connect");
    amqp_rpc_reply_t reply = amqp_login(connection, "/", 0, 131072, 0, AMQP_SASL_METHOD_PLAIN,
                                        "guest", "guest");
    check(reply.reply_type == AMQP_RESPONSE_NORMAL, "login");
    amqp_channel_open(connection, 1);
    check(answered(), "channel");
    amqp_channel_open(connection, 2);
    check(answered(), "channel");
    amqp_confirm_select(connection, 2);
    check(answered(), "confirm.select");

    char order[1024], row[64], queue[128];
    uint64_t published = 0;
    while (fgets(order, sizeof order, stdin)) {
        long count = number_in(order, "count", 1);
        long size = number_in(order, "size", 100);
        long prefetch = number_in(order, "prefetch", 0);
        long tasks = number_in(order, "tasks", 1);
        text_in(order, "row", row, sizeof row);
        text_in(order, "queue", queue, sizeof queue);
        double cpu_before = cpu(), wall_before = wall();
        if (!strcmp(row, "publish_raw")) {
            for (long i = 0; i < count; i++) publish(1, size);
            amqp_basic_qos(connection, 1, 0, 100, 0);
            check(answered(), "qos");
        } else if (!strcmp(row, "publish_confirmed")) {
            for (long i = 0; i < count; i++) {
                publish(2, size);
                published++;
                if (tasks == 1 || published % (uint64_t)tasks == 0) confirmed(published);
            }
            confirmed(published);
        } else if (!strcmp(row, "consume")) {
            consume(queue, count, prefetch);
        } else {
            check(0, row);
        }
        printf("{\"cpu_us\": %.3f, \"wall_us\": %.3f, \"count\": %ld}\n",
               (cpu() - cpu_before) / count * 1e6, (wall() - wall_before) / count * 1e6, count);
        fflush(stdout);
    }
    return 0;
}
