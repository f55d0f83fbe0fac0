/* SPDX-License-Identifier: GPL-2.0-or-later */
/* libFuzzer: three layers on real directories whose extended attributes are whatever the input
 * says: redirects, origins, link counts, opaque marks, overrides, names of any kind. All names are
 * looked up, listed and asked for; what comes back must lie in the layers.
 *
 * Input: one byte of options, then records: which file (3 bits) and which attribute (5 bits), the
 * length of its value, the value. Files are told apart by the low bits of their group, which stand
 * for their layer and name, so that an input means the same in every run. */
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>

#include "../../tree.h"
#include "../../xattrs.h"

enum { SLOTS = 8, MAX_ATTRS = 16, LAYERS = 3 };

struct attr {
    unsigned slot;
    char name[300];
    const uint8_t *value;
    size_t len;
};

static struct attr attrs[MAX_ATTRS];
static unsigned nattrs;
static int layer_fds[LAYERS] = {-1, -1, -1}, index_fd = -1;

static const char *const MARKS[] = {
    "trusted.overlay.redirect",
    "trusted.overlay.opaque",
    "trusted.overlay.metacopy",
    "trusted.overlay.origin",
    "trusted.overlay.nlink",
    "trusted.overlay.impure",
    "trusted.overlay.unionfs.ino",
    "trusted.overlay.whiteout",
    "user.overlay.redirect",
    "user.overlay.opaque",
    "user.overlay.metacopy",
    "user.overlay.origin",
    "user.overlay.nlink",
    "user.overlay.impure",
    "user.overlay.unionfs.ino",
    "user.fuseoverlayfs.opaque",
    "user.containers.override_stat",
    "security.fuseoverlayfs.override_stat",
    "user.fuseoverlayfs.override_stat",
    "user.containers.override_security.x",
    "trusted.overlay.overlay.redirect",
    "trusted.overlay.unionfs.links",
};
enum { NMARKS = sizeof MARKS / sizeof *MARKS };

errint_t __wrap_read_xattr(const char *path, bool nofollow, const char *attr, char **ret_value,
                           size_t *ret_len);
errint_t __wrap_read_xattr(const char *path, bool nofollow, const char *attr, char **ret_value,
                           size_t *ret_len)
{
    struct stat st;
    size_t len = 0;
    char *out;

    if ((nofollow ? lstat(path, &st) : stat(path, &st)) < 0)
        return -errno;
    unsigned slot = (unsigned)st.st_size % SLOTS;
    if (S_ISDIR(st.st_mode))
        slot = (st.st_mode >> 3) % SLOTS;
    if (!attr) {
        out = calloc(1, MAX_ATTRS * sizeof attrs[0].name + 1);
        for (unsigned i = 0; i < nattrs; i++) {
            if (attrs[i].slot == slot) {
                memcpy(out + len, attrs[i].name, strlen(attrs[i].name) + 1);
                len += strlen(attrs[i].name) + 1;
            }
        }
        *ret_value = out;
        *ret_len = len;
        return 0;
    }
    for (unsigned i = 0; i < nattrs; i++) {
        if (attrs[i].slot == slot && strcmp(attrs[i].name, attr) == 0) {
            out = malloc(attrs[i].len + 1);
            memcpy(out, attrs[i].value, attrs[i].len);
            out[attrs[i].len] = '\0';
            *ret_value = out;
            *ret_len = attrs[i].len;
            return 0;
        }
    }
    return -ENODATA;
}

static void make_file(int dirfd, const char *name, off_t size)
{
    int fd = openat(dirfd, name, O_CREAT | O_WRONLY | O_CLOEXEC, 0644);

    if (fd < 0 || ftruncate(fd, size) < 0)
        abort();
    (void)close(fd);
}

static int make_dir(int dirfd, const char *name, mode_t mode)
{
    if (mkdirat(dirfd, name, 0755) < 0 || fchmodat(dirfd, name, mode, 0) < 0)
        abort();
    return openat(dirfd, name, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
}

static char base[] = "/tmp/unionfs-fuzz-XXXXXX";

static void remove_base(void)
{
    char command[64];

    (void)snprintf(command, sizeof command, "rm -rf %s", base);
    (void)!system(command);
}

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    static const char *const LAYER_NAMES[LAYERS + 1] = {"upper", "middle", "bottom", "index"};

    (void)argc;
    (void)argv;
    (void)umask(0);
    if (!mkdtemp(base))
        abort();
    int base_fd = open(base, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    for (int i = 0; i < LAYERS; i++) {
        layer_fds[i] = make_dir(base_fd, LAYER_NAMES[i], 0755);
        int dir = make_dir(layer_fds[i], "dir", (mode_t)(0705 | (i + 1) << 3));
        make_file(dir, "file", 8 + i);
        if (i > 0) {
            make_file(dir, "other", 16 + i);
            make_file(layer_fds[i], "linked1", 32 + i);
            (void)linkat(layer_fds[i], "linked1", layer_fds[i], "linked2", 0);
        }
        make_file(layer_fds[i], "file", 64 + 3 + i);
        make_file(layer_fds[i], ".wh.gone", 0);
        (void)close(dir);
    }
    index_fd = make_dir(base_fd, LAYER_NAMES[LAYERS], 0755);
    (void)close(base_fd);
    (void)atexit(remove_base);
    return 0;
}

static void parse(const uint8_t *data, size_t size)
{
    nattrs = 0;
    while (size >= 3 && nattrs < MAX_ATTRS) {
        struct attr *a = &attrs[nattrs++];
        size_t len = data[1] | (size_t)(data[2] & 7) << 8;
        unsigned mark = data[0] >> 3;

        a->slot = data[0] % SLOTS;
        data += 3;
        size -= 3;
        len = len < size ? len : size;
        if (mark < NMARKS) {
            (void)snprintf(a->name, sizeof a->name, "%s", MARKS[mark]);
            a->value = data;
            a->len = len;
        } else { /* the value is a name */
            size_t n = len < 255 ? len : 255;

            memcpy(a->name, data, n);
            a->name[n] = '\0';
            if (!a->name[0])
                nattrs--;
            a->value = data;
            a->len = len;
        }
        data += len;
        size -= len;
    }
}

static int see_entry(void *arg, const struct dirent_out *entry)
{
    (void)arg;
    if (!entry->name[0] || strchr(entry->name, '/') || strlen(entry->name) > 255)
        abort();
    return 0;
}

static void look(struct tree *t, uint64_t parent, const char *name, int depth)
{
    struct stat st;
    struct entry entry;
    struct origin origin;
    char *list = NULL, *path = NULL;
    size_t len;
    uint64_t handle;
    bool keep;

    (void)tree_entry(t, parent, name, &entry);
    if (tree_lookup(t, parent, name, &st) < 0)
        return;
    if (xattr_list(t, st.st_ino, true, &list, &len) == 0) {
        for (size_t at = 0; at < len; at += strlen(list + at) + 1) {
            char *value = NULL;
            size_t value_len;

            if (xattr_get(t, st.st_ino, list + at, &value, &value_len) == 0)
                free(value);
        }
        free(list);
    }
    (void)origin_of(t, st.st_ino, &origin);
    if (tree_redirect_path(t, st.st_ino, &path) == 0) {
        /* What is said to lie in the lower layers lies beneath their roots. */
        if (path[0] != '/' || strstr(path, "/../") || strlen(path) >= PATH_MAX)
            abort();
        free(path);
    }
    if (S_ISDIR(st.st_mode)) {
        if (dir_open(t, st.st_ino, &handle, &keep) == 0) {
            (void)dir_read(t, handle, 0, see_entry, NULL);
            dir_release(t, handle);
        }
        if (depth > 0) {
            look(t, st.st_ino, "file", depth - 1);
            look(t, st.st_ino, "other", depth - 1);
            look(t, st.st_ino, "dir", depth - 1);
        }
    } else if (S_ISREG(st.st_mode) && file_open(t, st.st_ino, O_RDONLY, &handle) == 0) {
        file_release(t, handle);
    }
    node_forget(t, st.st_ino, 1);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct layer layers[LAYERS];
    struct tree *t = NULL;
    struct stat st;

    if (size < 1)
        return 0;
    struct tree_options options = {
        .has_upper = data[0] & 1,
        .user_prefix = data[0] & 2,
        .upper_xattrs = true,
        .override_mode = (data[0] >> 2) % 3,
        .squash_uid = -1,
        .squash_gid = -1,
        .max_open_dirs = 2,
        .index_fd = data[0] & 16 ? index_fd : -1,
        .numbers_fd = -1,
        .image_fd = -1,
    };
    parse(data + 1, size - 1);
    for (int i = 0; i < LAYERS; i++) {
        if (fstat(layer_fds[i], &st) < 0)
            abort();
        layers[i] = (struct layer){.fd = layer_fds[i],
                                   .fs = (uint16_t)(data[0] & 32 ? i : 0),
                                   .careful = data[0] & 64,
                                   .wh_files = data[0] & 128,
                                   .dev = st.st_dev};
    }
    if (tree_new(layers, LAYERS, &options, &t) < 0)
        abort();
    look(t, ROOT_INO, "dir", 2);
    look(t, ROOT_INO, "file", 0);
    look(t, ROOT_INO, "linked1", 0);
    look(t, ROOT_INO, "linked2", 0);
    look(t, ROOT_INO, "gone", 0);
    if (t->node_count != 1 || t->name_count != 0)
        abort();
    tree_free(t);
    return 0;
}
